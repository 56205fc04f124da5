"""Colour operations, each patch with a strength of its own.

The jitter runs on patches that are sorted by the hue shift's place among its four operations. So
the costly hue rotation takes all patches at once, and the others before and after it are slices.
These are one formula with coefficients per patch.
"""

from itertools import accumulate

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the operations of the jitter
LUMA = 0.2989, 0.587, 0.114  # of red, green and blue, after ITU-R 601


def grey(x: Tensor) -> Tensor:
    """Luma: RGB (k, 3, ...) -> (k, ...)."""
    (red, green, blue), (of_red, of_green, of_blue) = x.unbind(1), LUMA
    return (red * of_red).add_(green, alpha=of_green).add_(blue, alpha=of_blue)


def solarize(x: Tensor) -> Tensor:
    """Inverts values of at least one half, 128 and above in 8 bits: the smaller of x and 1 - x."""
    return torch.minimum(x, 1 - x)


def jitter_table(order: Tensor, factors: Tensor) -> Tensor:
    """Coefficients of the jitter, (4, 3, k, 1): for each of the four places what `blend` takes.

    Brightness, contrast and saturation blend a patch with black, with its mean grey and with its
    grey image: clamp(f x + (1 - f) other). The coefficients are f, the share of the grey image and
    the share of the mean grey. A share is 1 - f for the operation that it belongs to, and else 0.
    Those at the hue shift's place mean nothing.

    Args:
        order: int64 (k, 4), the operations in order of application.
        factors: (k, 4), the strength of each operation: three factors, and the hue shift in turns.
    """
    strength = factors.gather(-1, order)
    rest = 1 - strength
    table = torch.stack((strength, rest * (order == SATURATION), rest * (order == CONTRAST)))
    return table.permute(2, 0, 1).unsqueeze(-1).contiguous()


def jitter_matrices(table: Tensor) -> Tensor:
    """The same coefficients as matrices of colours, (4, 2, k, 3, 3), for `blend_by_matrices`."""
    strength, to_grey, to_mean = table.unsqueeze(-1).unbind(1)
    luma = torch.tensor(LUMA).expand(3, 3)  # in every row
    return torch.stack((strength * torch.eye(3) + to_grey * luma, to_mean * luma), 1)


def color_jitter(x: Tensor, hue_counts: list[int], turns: Tensor, table: Tensor) -> None:
    """Brightness, contrast, saturation and hue in each patch's own order, in place.

    Args:
        x: patches (k, 3, s, s) in [0, 1], sorted by the hue shift's place.
        hue_counts: how many of them have the hue shift first, second, third and fourth. The patches
            after these are left as they are.
        turns: (k, 1), the hue shifts.
        table: for the same patches, from `jitter_table`, or from `jitter_matrices` for fewer and
            larger calls, as an accelerator wants them.
    """
    x = x.view(len(x), 3, -1)
    bounds = [0, *accumulate(hue_counts[:4])]
    end = bounds[-1]
    mix = blend if table.ndim == 4 else blend_by_matrices

    def others(place: int, patches: slice) -> None:
        if patches.start < patches.stop:
            mix(x[patches], *table[place, :, patches])

    for place in range(3):
        others(place, slice(bounds[place + 1], end))
    if end:
        rotate_hue(x[:end], turns[:end])
    for place in range(1, 4):
        others(place, slice(0, bounds[place]))


def blend(x: Tensor, strength: Tensor, to_grey: Tensor, to_mean: Tensor) -> None:
    """clamp(strength x + to_grey grey(x) + to_mean mean(grey(x))), in place.

    Shapes: x (k, 3, p), coefficients (k, 1).
    """
    luma = grey(x)
    constant = to_mean * luma.mean(-1, keepdim=True)
    other = luma.mul_(to_grey).add_(constant)
    # Steps of two operands: torch's CPU kernels of three (addcmul, lerp) are several times slower
    # when one of them is broadcast.
    x.mul_(strength[:, None]).add_(other[:, None]).clamp_(0, 1)


def blend_by_matrices(x: Tensor, own: Tensor, of_mean: Tensor) -> None:
    """clamp(own x + of_mean mean(x)), in place: `blend` in four calls in place of ten.

    A CPU takes longer for these. Shapes: x (k, 3, p), matrices (k, 3, 3).
    """
    constant = of_mean @ x.mean(-1, keepdim=True)
    torch.clamp(torch.baddbmm(constant, own, x), 0, 1, out=x)


def rotate_hue(x: Tensor, turns: Tensor) -> None:
    """Shifts the hue of RGB (k, 3, p) by ``turns`` (k, 1) of the colour wheel, in place.

    The usual HSV conversion without its six cases. Let low be the smallest channel value and spread
    the distance from there to the largest. The hue lies between -1/2 and 1/2 turn from red, towards
    green if green > blue. Its size in sixths of a turn is 1 + (green + blue - red - low) / spread.

    A shift keeps low and spread. Each channel has a hue of its own (red 0, green 1/3, blue 2/3). It
    is at the largest value up to a sixth of a turn away from there, at the smallest beyond a third,
    and linear between. Red, whose hue is both 0 and 1, counts from the opposite, 1/2.
    """
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    spread = high - low
    # The bound is for grey pixels: it makes their hue, which is arbitrary, finite.
    slope = (6 * spread).clamp_(min=1e-30)
    size = (green + blue).sub_(red).sub_(low).div_(slope).add_(1 / 6)
    hue = size.copysign_(green - blue).add_(turns + 1).frac_()  # from 0 to 1
    top = high + spread
    bottom = high.sub_(spread, alpha=2)
    torch.addcmul(bottom, slope, (hue - 1 / 2).abs_().clamp_(1 / 6, 1 / 3), out=red)
    torch.addcmul(top, slope, (hue - 1 / 3).abs_().clamp_(1 / 6, 1 / 3), value=-1, out=green)
    torch.addcmul(top, slope, hue.sub_(2 / 3).abs_().clamp_(1 / 6, 1 / 3), value=-1, out=blue)
