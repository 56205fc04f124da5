"""Crops and resizing, each patch with a box of its own."""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

# Up to this side in pixels, patches are resized by products with matrices, though most entries are
# zero: on a CPU three times faster than torch's interpolation at 32 pixels, equal near 96.
MATRIX_SIZE = 64
REACH = {"bilinear": 1, "bicubic": 2}  # pixels on each side of a centre that count


def first_pixels(source: torch.Size, image: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Place of each window's first pixel in the source, counted in one of its channels.

    Args:
        source: shape (m, 3, H, W).
        image, top, left: int64 (k,), the image of each window and its first row and column.
    """
    _, channels, rows, columns = source
    return (image * channels * rows + top) * columns + left


def crops(source: Tensor, first: Tensor, height: int, width: int) -> Tensor:
    """Windows of one size of uint8 ``source`` (m, 3, H, W) -> float32 (k, 3, height, width).

    Args:
        source: contiguous.
        first: from `first_pixels`.

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
    return windows.index_select(0, first).float().div_(255)


def resize(x: Tensor, size: int, interpolation: str) -> Tensor:
    """(k, 3, h, w) -> (k, 3, size, size) with antialiasing, within [0, 1].

    Clamped because bicubic interpolation overshoots, which 8-bit pixels cannot.
    """
    if size <= MATRIX_SIZE:
        rows, columns = (
            resize_weights(length, size, interpolation, x.device) for length in x.shape[-2:]
        )
        x = separable(x, rows, columns)
    else:
        # Enlarging bilinearly needs no antialiasing, and is faster without.
        antialias = interpolation == "bicubic" or max(x.shape[-2:]) > size
        x = functional.interpolate(x, (size, size), mode=interpolation, antialias=antialias)
    return x.clamp_(0, 1)


@functools.lru_cache(maxsize=16)
def resize_weights(length: int, size: int, interpolation: str, device: torch.device) -> Tensor:
    """Weights (size, length) that resize a whole axis."""
    start = torch.zeros(1, dtype=torch.int64, device=device)
    plan = resample_plan(start, start + length, size, interpolation)
    return resample_weights(plan, length, size, interpolation)[0]


def resized_crops_plan(
    source: torch.Size, box: Tensor, window: tuple[int, int], size: int, interpolation: str
) -> list[Tensor]:
    """What `resized_crops` needs besides the pixels: small tensors, made on the host.

    Args:
        source: shape (m, 3, H, W).
        box: int64 (5, k), rows image, top, left, height, width.
    """
    image, top, left, *lengths = box
    height, width = window
    first_row = top.clamp(max=source[-2] - height)
    first_column = left.clamp(max=source[-1] - width)
    starts = torch.cat((top - first_row, left - first_column))
    axes = resample_plan(starts, torch.cat(lengths), size, interpolation)
    return [first_pixels(source, image, first_row, first_column), *axes]


def resized_crops(
    source: Tensor, plan: list[Tensor], window: tuple[int, int], size: int, interpolation: str
) -> Tensor:
    """Boxes of uint8 ``source`` (m, 3, H, W) -> float32 (k, 3, size, size) in [0, 1], antialiased.

    Args:
        source: contiguous.
        plan: from `resized_crops_plan`.
        window: the greatest height and width of the boxes.
    """
    first, *axes = plan
    height, width = window
    x = crops(source, first, height, width)
    if height == width:  # both axes at once
        rows, columns = resample_weights(axes, height, size, interpolation).chunk(2)
    else:
        rows, columns = (
            resample_weights(list(parts), length, size, interpolation)
            for parts, length in zip(zip(*(part.chunk(2) for part in axes)), window)
        )
    return separable(x, rows[:, None], columns[:, None]).clamp_(0, 1)


def resample_plan(start: Tensor, length: Tensor, output: int, interpolation: str) -> list[Tensor]:
    """Where the output pixels of `resample_weights` look, one row per axis: made on the host.

    Args:
        start, length: int64 (k,), the pixels [start, start + length) of the axis are resized.
        output: pixels of the axis afterwards.

    Returns:
        First source pixel of each output pixel, from the axis' start (int64) and from the box's;
        centre of each output pixel, from the box's start; stretch of the kernel; length.
    """
    start, length = start[:, None], length[:, None]
    ratio = length / output
    stretch = ratio.clamp(min=1)
    centre = (torch.arange(output, device=start.device) + 0.5) * ratio
    first = (centre - REACH[interpolation] * stretch).floor()
    return [first.long() + start, first, centre, stretch, length.float()]


def resample_weights(plan: list[Tensor], source: int, output: int, interpolation: str) -> Tensor:
    """Weights (k, output, source) that resize the pixels of an axis.

    PIL's rule, as in torchvision's ``antialias=True``: a triangle (bilinear) or a cubic with
    a = -0.5 (bicubic) around the centre of each output pixel, stretched when shrinking, cut off at
    the box and normalised.

    Args:
        plan: from `resample_plan`, on the device of the weights.
        source, output: pixels of the axis before and after.
    """
    place, first, centre, stretch, length = (part.unsqueeze(-1) for part in plan)
    # Only the few pixels within reach are weighed, and then put in their places.
    taps = 2 * math.ceil(REACH[interpolation] * max(1.0, source / output)) + 1
    step = torch.arange(taps, device=first.device)
    pixel = first + step
    distance = (pixel + 0.5 - centre).abs_().div_(stretch)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, far * (distance < 2))
    weights = weights * ((pixel >= 0) & (pixel < length))
    weights = weights / weights.sum(-1, keepdim=True)
    # The margins take the pixels beyond the axis, whose weight is 0.
    places = weights.new_zeros(len(weights), output, taps + source + taps)
    return places.scatter_(-1, (place + step).add_(taps), weights)[..., taps:-taps]


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A linear map of rows and columns: (k, 3, h, w), (..., s, h), (..., s, w) -> (k, 3, s, s)."""
    return rows @ (x @ columns.mT)
