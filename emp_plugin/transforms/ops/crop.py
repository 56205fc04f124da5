"""Crops and resizing, each patch with a box of its own."""

import math

import torch
from torch import Tensor
from torch.nn import functional

# Up to this side in pixels, patches are resized by products with matrices, though most entries are
# zero: on a CPU three times faster than torch's interpolation at 32 pixels, equal near 96.
MATRIX_SIZE = 64


def crops(
    source: Tensor, image: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> Tensor:
    """Windows of one size of uint8 ``source`` (m, 3, H, W) -> float32 (k, 3, height, width).

    Args:
        source: contiguous.
        image, top, left: int64 (k,), the image of each window and its first row and column.

    Returns:
        Values in [0, 1].
    """
    _, channels, rows, columns = source.shape
    # All windows at once, as a view: one starts at every pixel (those that wrap around are never
    # asked for). Selecting from it copies whole rows, in bytes, and is several times faster than
    # indexing every pixel.
    reach = (channels - 1) * rows * columns + (height - 1) * columns + width
    windows = source.as_strided(
        (source.numel() - reach + 1, channels, height, width), (1, rows * columns, columns, 1)
    )
    first_pixel = (image * channels * rows + top) * columns + left
    return windows.index_select(0, first_pixel).float().div_(255)


def resize(x: Tensor, size: int, interpolation: str) -> Tensor:
    """(k, 3, h, w) -> (k, 3, size, size) with antialiasing, within [0, 1].

    Clamped because bicubic interpolation overshoots, which 8-bit pixels cannot.
    """
    if size <= MATRIX_SIZE:
        start = torch.zeros(1, device=x.device)
        rows, columns = (
            resample_weights(start, start + length, length, size, interpolation)[0]
            for length in x.shape[-2:]
        )
        x = separable(x, rows, columns)
    else:
        # Enlarging bilinearly needs no antialiasing, and is faster without.
        antialias = interpolation == "bicubic" or max(x.shape[-2:]) > size
        x = functional.interpolate(x, (size, size), mode=interpolation, antialias=antialias)
    return x.clamp_(0, 1)


def resized_crops(
    source: Tensor, box: Tensor, window: tuple[int, int], size: int, interpolation: str
) -> Tensor:
    """Boxes of uint8 ``source`` (m, 3, H, W) -> float32 (k, 3, size, size) in [0, 1], antialiased.

    Args:
        source: contiguous.
        box: int64 (5, k), rows image, top, left, height, width.
        window: the greatest height and width of the boxes.
    """
    image, top, left, box_height, box_width = box
    height, width = window
    first_row = top.clamp(max=source.shape[-2] - height)
    first_column = left.clamp(max=source.shape[-1] - width)
    rows = resample_weights(top - first_row, box_height, height, size, interpolation)
    columns = resample_weights(left - first_column, box_width, width, size, interpolation)
    x = crops(source, image, first_row, first_column, height, width)
    return separable(x, rows[:, None], columns[:, None]).clamp_(0, 1)


def resample_weights(
    start: Tensor, length: Tensor, source: int, output: int, interpolation: str
) -> Tensor:
    """Weights (k, output, source) that resize the pixels [start, start + length) of an axis.

    PIL's rule, as in torchvision's ``antialias=True``: a triangle (bilinear) or a cubic with
    a = -0.5 (bicubic) around the centre of each output pixel, stretched when shrinking, cut off at
    the box and normalised.

    Args:
        start, length: (k,) in source pixels.
        source, output: pixels of the axis before and after.
    """
    start, length = start[:, None, None], length[:, None, None]
    ratio = length / output
    stretch, reach = ratio.clamp(min=1), 1 if interpolation == "bilinear" else 2
    centre = (torch.arange(output, device=start.device)[:, None] + 0.5) * ratio
    # Only the few pixels within reach are weighed, and then put in their places.
    taps = 2 * math.ceil(reach * max(1.0, source / output)) + 1
    pixel = (centre - reach * stretch).floor() + torch.arange(taps, device=start.device)
    distance = (pixel + 0.5 - centre).abs_().div_(stretch)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * ((pixel >= 0) & (pixel < length))
    weights = weights / weights.sum(-1, keepdim=True)
    # The margins take the pixels beyond the axis, whose weight is 0.
    places = weights.new_zeros(len(weights), output, taps + source + taps)
    return places.scatter_(-1, (pixel + start).long() + taps, weights)[..., taps:-taps]


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A linear map of rows and columns: (k, 3, h, w), (..., s, h), (..., s, w) -> (k, 3, s, s)."""
    return rows @ (x @ columns.mT)
