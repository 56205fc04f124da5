"""The objective of EMP-SSL as pure functions of tensors.

Tong, Chen, Ma and LeCun, "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", arXiv
2304.03977.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class EMPLoss(NamedTuple):
    """What :func:`emp_ssl_loss` returns: scalars, of which only ``loss`` is to be minimised."""

    loss: Tensor
    coding_rate: Tensor
    invariance: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself in float32 and float64, in float32 otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def total_coding_rate(z: Tensor, eps: float = 0.2) -> Tensor:
    """Total coding rate ``R(Z) = 1/2 logdet(I + d / (b eps) Z Z^T)``, in nats.

    It is large when the rows of Z span many directions. The value is wrong where ``d / (b eps)`` is
    above about 1e4 (published: 51): the rounding of parallel rows in float32 is then no longer
    small beside the identity.

    Args:
        z: features of shape ``(..., b, d)``, one row a sample, rows of length 1.
        eps: the paper's squared distortion eps^2 (it is not squared again here).

    Returns:
        A tensor of shape ``(...)``, in float32 or, for float64 input, float64.

    Raises:
        ValueError: if ``z`` has fewer than two dimensions, no rows or no columns, or ``eps`` is not
            positive.

    Source: R in the objective of arXiv 2304.03977; the coding rate is that of MCR^2
    (arXiv 2006.08558).

    >>> total_coding_rate(torch.eye(2), eps=1.0)  # 1/2 logdet(2 I)
    tensor(0.6931)
    """
    if z.ndim < 2 or 0 in z.shape[-2:]:
        raise ValueError(
            f"total_coding_rate needs z of shape (..., b, d) with b, d >= 1, got {tuple(z.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"total_coding_rate needs eps > 0, got {eps}")
    b, d = z.shape[-2:]
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        return _HalfLogDet.apply(z, d / (b * eps))


class _HalfLogDet(torch.autograd.Function):
    """``1/2 logdet(I + scale Z Z^T)``.

    Its gradient ``scale (I + scale Z Z^T)^-1 Z`` takes half the time of autograd's.
    """

    @staticmethod
    def forward(ctx, z: Tensor, scale: float) -> Tensor:
        # Z Z^T and Z^T Z give the same determinant (Sylvester); the smaller one is cheaper
        matrix = (z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z).mul_(scale)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        # All eigenvalues are >= 1, so Cholesky does not fail while rounding is small beside 1. The
        # _ex form spares the host the wait for a GPU's error code.
        factor = torch.linalg.cholesky_ex(matrix).L
        ctx.save_for_backward(z, factor)
        ctx.scale = scale
        # 1/2 logdet is the sum of the logarithms of Cholesky's diagonal. Without the second term a
        # non-finite matrix could hide behind a partial factor.
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0 * matrix.sum((-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        z, factor = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            # (L L^T)^-1 from L^-1. torch.cholesky_inverse is a little faster on a CPU
            # (benchmarks/README.md), but makes the host wait for a GPU's error code.
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            root = torch.linalg.solve_triangular(factor, eye, upper=False)
            inverse = (root.mT @ root).mul_((upstream * ctx.scale)[..., None, None])
            return (inverse @ z if z.shape[-2] <= z.shape[-1] else z @ inverse), None


def patch_invariance(z: Tensor) -> Tensor:
    """Mean cosine similarity of each patch's features with the mean over the patches of its image.

    Args:
        z: features of shape ``(n, b, d)``: n patches of each of b images.

    Returns:
        A scalar in [-1, 1], 1 when all patches of an image agree; float32 or better.

    Raises:
        ValueError: if ``z`` is not three-dimensional or is empty.

    Source: D in the objective of arXiv 2304.03977, with the batch mean of the authors' code in
    place of the sum.
    """
    if z.ndim != 3 or 0 in z.shape:
        raise ValueError(
            f"patch_invariance needs z of shape (n, b, d), none of them 0, got {tuple(z.shape)}"
        )
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        centre = F.normalize(z.mean(0), dim=-1)
        # F.cosine_similarity would make copies of z for both of its arguments
        products = torch.einsum("nbd,bd->nb", z, centre)
        return (products / torch.linalg.vector_norm(z, dim=-1).clamp_min(1e-8)).mean()


def emp_ssl_loss(
    z: Tensor, invariance_weight: float = 200.0, eps: float = 0.2, gathered: Tensor | None = None
) -> EMPLoss:
    """EMP-SSL's loss ``-(R + invariance_weight D)``.

    R is the mean coding rate of the n batches of patches, D their invariance.

    Args:
        z: projections of shape ``(n, b, d)``, of length 1 along d.
        invariance_weight: lambda; 200 belongs to the batch mean of the similarity.
        eps: the paper's eps^2.
        gathered: projections ``(n, w b, d)`` of the whole batch, where z are those of one of w
            processes. The coding rate is then theirs.

    Returns:
        :class:`EMPLoss` of three scalars; the two terms are not detached.

    Raises:
        ValueError: see :func:`total_coding_rate` and :func:`patch_invariance`.

    Source: the objective of arXiv 2304.03977, negated.
    """
    invariance = patch_invariance(z)
    coding_rate = total_coding_rate(z if gathered is None else gathered, eps).mean()
    return EMPLoss(-(coding_rate + invariance_weight * invariance), coding_rate, invariance)
