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


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of patches (k, 3, s, s), with 2 radius + 1 taps and reflected borders.

    Args:
        sigma: standard deviations (k,) in pixels.
        radius: taps on each side of the centre, below s.
    """
    steps = torch.arange(-radius, radius + 1, device=x.device)
    taps = (steps.square() / (-2 * sigma.square()[:, None])).exp()
    taps = taps / taps.sum(-1, keepdim=True)
    return _blur_and_transpose(_blur_and_transpose(x, taps), taps)


def _blur_and_transpose(x: Tensor, taps: Tensor) -> Tensor:
    """Blurs (k, 3, s, s) along the last axis with taps (k, 2 radius + 1), then transposes it.

    Twice does both axes. The axis is cut into pieces of at most 32 pixels. Each piece is the
    product of a window, 2 radius pixels longer, and a band matrix, one per patch.
    """
    k, _, _, size = x.shape
    margin = taps.shape[1] - 1  # 2 radius
    pieces = math.ceil(size / 32)
    piece = math.ceil(size / pieces)
    window = piece + margin

    # The band matrix: every row holds the taps, one place further on than the row before. In memory
    # that is the taps followed by `piece` zeros, over and over, read in rows of `window` numbers.
    repeated = functional.pad(taps[:, None].expand(-1, piece, -1), (0, piece)).flatten(1)
    band = repeated[:, : piece * window].view(k, piece, window)

    x = functional.pad(x, (margin // 2, margin // 2, 0, 0), mode="reflect")
    x = functional.pad(x, (0, pieces * piece - size))
    windows = x.unfold(-1, window, piece).reshape(k, -1, window)
    return torch.bmm(windows, band.mT).view(k, 3, size, -1)[..., :size].mT
