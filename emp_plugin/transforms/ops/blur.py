"""Gaussian blur, each patch with a standard deviation of its own."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def blur_radius(max_sigma: float, size: int) -> int:
    """Taps on each side of the blur's centre: four standard deviations (kernel of 17 for sigma 2), inside the patch."""
    return min(math.ceil(4 * max_sigma), size - 1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of (k, 3, s, s) with standard deviations (k,) in pixels, 2 radius + 1 taps and reflected borders.

    Needs radius < s.
    """
    taps = (
        torch.arange(-radius, radius + 1, device=x.device).square() / (-2 * sigma.square()[:, None])
    ).exp()
    taps = taps / taps.sum(-1, keepdim=True)
    return _blur_columns(_blur_columns(x, taps), taps)


def _blur_columns(x: Tensor, taps: Tensor) -> Tensor:
    """Blurs (k, 3, s, s) along the last axis with taps (k, 2 radius + 1) and transposes it, so that twice does both axes.

    By pieces of up to 32 pixels, which are products of a window of 2 radius more with a band matrix per patch.
    """
    k, _, _, size = x.shape
    margin = taps.shape[1] - 1
    pieces = math.ceil(size / 32)
    piece = math.ceil(size / pieces)
    rest = pieces * piece - size
    # A row of taps and zeros that is one longer than the matrix's moves on by one from row to row.
    band = functional.pad(taps[:, None].expand(-1, piece, -1), (0, piece)).flatten(1)[
        :, : piece * (piece + margin)
    ]
    windows = functional.pad(
        functional.pad(x, (margin // 2,) * 2 + (0, 0), mode="reflect"), (0, rest)
    ).unfold(-1, piece + margin, piece)
    blurred = torch.bmm(windows.reshape(k, -1, piece + margin), band.view(k, piece, -1).mT)
    return blurred.view(k, 3, size, -1)[..., :size].mT
