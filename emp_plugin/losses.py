"""The objective of EMP-SSL as pure functions of tensors.

Tong, Chen, Ma and LeCun, "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", arXiv
2304.03977.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EMPLoss", "EMPSSLLoss", "emp_ssl_loss", "patch_invariance", "total_coding_rate"]

# The largest eigenvalue of d / (b eps) Z Z^T is d / eps at most, of parallel rows. Above this one
# its rounding in float32 is not small beside the identity: measured at up to 2,000 rows, the value
# is 0.3 % off here, 8 % at ten times as much. Published: 5,120.
MOST_IN_FLOAT32 = 1e5


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

    It is large when the rows of Z span many directions.

    Args:
        z: features of shape ``(..., b, d)``, one row a sample, rows of length 1.
        eps: the paper's squared distortion eps^2 (it is not squared again here).

    Returns:
        A tensor of shape ``(...)``, in float32 or, for float64 input, float64.

    Raises:
        ValueError: if ``z`` has fewer than two dimensions, no rows or no columns, ``eps`` is not
            positive, or so small that the rate needs float64 (:data:`MOST_IN_FLOAT32`).

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
    if z.dtype != torch.float64 and d / eps > MOST_IN_FLOAT32:
        raise ValueError(
            f"total_coding_rate needs d / eps of at most {MOST_IN_FLOAT32:g} in float32, got "
            f"{d} / {eps}: take a larger eps, or z in float64"
        )
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        # Z Z^T and Z^T Z give the same determinant (Sylvester); the smaller one is cheaper
        matrix = d / (b * eps) * (z @ z.mT if b <= d else z.mT @ z)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        # All eigenvalues are >= 1, so Cholesky does not fail while rounding is small beside 1. The
        # _ex form spares the host the wait for a GPU's error code.
        factor: Tensor = torch.linalg.cholesky_ex(matrix).L
        # 1/2 logdet is the sum of the logarithms of Cholesky's diagonal. Without the second term a
        # non-finite matrix could hide behind a partial factor.
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0 * matrix.detach().sum((-2, -1))


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
        norms: Tensor = torch.linalg.vector_norm(z, dim=-1)
        return (products / norms.clamp_min(1e-8)).mean()


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


class EMPSSLLoss(nn.Module):
    """EMP-SSL's loss as a module, over the images of all processes: :func:`emp_ssl_loss`.

    Where ``torch.distributed`` is initialised, each process gives the projections of its own
    images, equally many. With DDP's mean the gradient is then that of one process with all images.

    Args:
        invariance_weight: lambda.
        eps: the paper's eps^2.

    Shapes: z (n, b, d), n patches of each of b images, of length 1 along d -> scalar to minimise.

    Raises:
        ValueError: see :func:`emp_ssl_loss`.

    >>> EMPSSLLoss()(torch.ones(4, 1, 1))  # all patches agree: -(1/2 log(1 + 1 / 0.2) + 200)
    tensor(-200.8959)
    """

    def __init__(self, invariance_weight: float = 200.0, eps: float = 0.2) -> None:
        super().__init__()
        self.invariance_weight, self.eps = invariance_weight, eps

    def forward(self, z: Tensor) -> Tensor:
        return emp_ssl_loss(z, self.invariance_weight, self.eps, gather_images(z)).loss

    def extra_repr(self) -> str:
        return f"invariance_weight={self.invariance_weight}, eps={self.eps}"


def gather_images(z: Tensor) -> Tensor:
    """z (n, b, d) of this process's images -> (n, w b, d) of those of all w processes.

    They are in the order of the global batch. Gradients flow back to every process: each receives
    the sum over all processes, of whose parameter gradients DDP takes the mean.
    """
    if not is_distributed():
        return z
    from torch.distributed.nn.functional import all_gather  # which some builds of torch lack

    return torch.cat(all_gather(z), dim=1)


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized()
