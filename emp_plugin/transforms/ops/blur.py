"""Gaussian blur, each patch with a standard deviation of its own."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def blur_radius(max_sigma: float, size: int) -> int:
    """Taps on each side of the centre: four standard deviations, but inside the patch.

    For sigma 2 that is 8, a kernel of 17 taps.
    """
    return min(math.ceil(4 * max_sigma), size - 1)


def gaussian_taps(sigma: Tensor, radius: int) -> Tensor:
    """Kernels (k, 2 radius + 1) of standard deviations (k,) in pixels, each with the sum 1."""
    steps = torch.arange(-radius, radius + 1, device=sigma.device)
    taps = (steps.square() / (-2 * sigma.square()[:, None])).exp()
    return taps / taps.sum(-1, keepdim=True)


def gaussian_blur(x: Tensor, taps: Tensor) -> Tensor:
    """Blur of patches (k, 3, s, s), with reflected borders.

    Args:
        taps: each patch's kernel, (k, 2 radius + 1) with radius below s, from `gaussian_taps`.
    """
    size, margin = x.shape[-1], taps.shape[1] - 1  # 2 radius
    pieces = math.ceil(size / 32)
    piece = math.ceil(size / pieces)
    window = piece + margin
    # The band matrix: every row holds the taps, one place further on than the row before. In memory
    # that is the taps followed by `piece` zeros, over and over, read in rows of `window` numbers.
    repeated = functional.pad(taps[:, None].expand(-1, piece, -1), (0, piece)).flatten(1)
    band = repeated[:, : piece * window].view(len(x), piece, window)
    return _blur_and_transpose(_blur_and_transpose(x, band, pieces), band, pieces)


def _blur_and_transpose(x: Tensor, band: Tensor, pieces: int) -> Tensor:
    """Blurs (k, 3, s, s) along the last axis, then transposes it; twice does both axes.

    The axis is cut into pieces of at most 32 pixels. Each piece is the product of a window, 2
    radius pixels longer, and a band matrix (k, piece, window), one per patch.
    """
    k, _, _, size = x.shape
    piece, window = band.shape[1:]
    margin = window - piece
    x = functional.pad(x, (margin // 2, margin // 2, 0, 0), mode="reflect")
    if pieces * piece > size:
        x = functional.pad(x, (0, pieces * piece - size))
    windows = x.unfold(-1, window, piece).reshape(k, -1, window)
    return torch.bmm(windows, band.mT).view(k, 3, size, -1)[..., :size].mT
