"""Colour operations, each patch with a strength of its own."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor


def grey(x: Tensor) -> Tensor:
    """Luma after ITU-R 601: RGB (k, 3, ...) -> (k, ...)."""
    red, green, blue = x.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def color_jitter(x: Tensor, hue_at: list[int], table: Tensor) -> None:
    """Brightness, contrast, saturation and hue in each patch's own order, in place, on (k, 3, s, s) in [0, 1].

    Args:
        hue_at: for how many of these patches, one after the other, the hue shift stands first, second, third and fourth;
            the rest of them are left as they are.
        table: from `_jitter_table`.
    """
    x = x.view(len(x), 3, -1)
    bounds = [0, *accumulate(hue_at[:4])]
    for place, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            rotate_hue(x[start:end], table[place, 0, start:end])
        for others in (slice(0, start), slice(end, bounds[-1])):
            if others.start < others.stop:
                blend(x[others], *table[place, :, others])


def blend(x: Tensor, strength: Tensor, to_grey: Tensor, to_mean: Tensor) -> None:
    """clamp(strength x + to_grey grey(x) + to_mean mean(grey(x))) in place on (k, 3, p); coefficients (k, 1)."""
    luma = grey(x)
    constant = to_mean * luma.mean(-1, keepdim=True)
    other = luma.mul_(to_grey).add_(constant)
    # Two-operand steps: torch's CPU kernels of three (addcmul, lerp) are several times slower when one is broadcast.
    x.mul_(strength[:, None]).add_(other[:, None]).clamp_(0, 1)


def rotate_hue(x: Tensor, turns: Tensor) -> None:
    """Shifts the hue by ``turns`` (k, 1) of the colour wheel, in place on RGB (k, 3, p).

    The usual HSV conversion without its six cases. The hue lies between -1/2 and 1/2 turn from red, towards green if
    green > blue; its size in sixths of a turn is 1 + (green + blue - red - low) / spread, where low and spread are the
    smallest channel value and the distance from there to the largest. A hue shift keeps both. The shifted channel is at
    the largest up to a sixth of a turn away from its own hue (red 0, green 1/3, blue 2/3), at the smallest beyond a third,
    and linear between. Red, whose hue is both 0 and 1, counts from the opposite, 1/2.
    """
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    spread = high - low
    slope = (6 * spread).clamp_(
        min=1e-30
    )  # not 0 for grey pixels, whose hue is arbitrary and finite
    size = (green + blue).sub_(red).sub_(low).div_(slope).add_(1 / 6)
    hue = size.copysign_(green - blue).add_(turns + 1).frac_()  # from 0 to 1
    top = high + spread
    torch.addcmul(
        high.sub_(spread, alpha=2), slope, (hue - 1 / 2).abs_().clamp_(1 / 6, 1 / 3), out=red
    )
    torch.addcmul(top, slope, (hue - 1 / 3).abs_().clamp_(1 / 6, 1 / 3), value=-1, out=green)
    torch.addcmul(top, slope, hue.sub_(2 / 3).abs_().clamp_(1 / 6, 1 / 3), value=-1, out=blue)


def solarize(x: Tensor) -> Tensor:
    """Inverts values of at least one half, which is 128 and above in 8 bits: the smaller of x and 1 - x."""
    return torch.minimum(x, 1 - x)
