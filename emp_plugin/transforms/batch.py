"""A uint8 batch of images -> n augmented patches of each, on any device: the fast path, used for training.

Same recipe as `MultiPatchTransform` (EMP-SSL, arXiv 2304.03977), every patch with its own parameters. These
are drawn on the CPU, whatever the device, for two reasons: the patches do not depend on the device, and which of them
are blurred, greyed and so on is known without asking the accelerator (no synchronisation). What follows is one straight
line over blocks of patches. They are in order of the hue shift's place in the jitter, so that the costly hue rotation
runs once per patch, on slices; the other three operations are one formula with per-patch coefficients.
"""

import math
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .recipe import PatchRecipe

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# Bytes of one float32 copy of a block. On a CPU a few such copies should stay in the last-level cache, but much smaller
# blocks pay for more calls; on an accelerator blocks only bound the memory (2,000 patches of 32x32 are one): a fast GPU
# is done with an operation on all of them about as soon as the host has launched the next.
CPU_BLOCK_BYTES = 2**22
DEVICE_BLOCK_BYTES = 2**28

# Up to this side in pixels, patches are resized by products with matrices, though most entries are zero: on a CPU three
# times faster than torch's interpolation at 32 pixels, equal near 96 (benchmarks/README.md).
MATRIX_SIZE = 64


class PatchParameters(NamedTuple):
    """Everything random about the patches of a batch: CPU tensors, shape (n, b) unless said otherwise."""

    top: Tensor  # int64, first row of the crop, in source pixels
    left: Tensor  # int64, first column
    height: Tensor  # int64, rows of the crop
    width: Tensor  # int64, columns of the crop
    flip: Tensor  # bool
    jitter: Tensor  # bool
    order: Tensor  # int64 (n, b, 4), the jitter's operations in order of application (BRIGHTNESS ... HUE)
    factors: Tensor  # float32 (n, b, 4), strength per operation: three factors, and the hue shift in turns
    grey: Tensor  # bool
    blur: Tensor  # bool
    sigma: Tensor  # float32, standard deviation of the blur in output pixels
    solarize: Tensor  # bool

    def select(
        self, patches: slice = slice(None), images: slice = slice(None)
    ) -> "PatchParameters":
        """The parameters of some patches (first dimension) of some images (second one), as views."""
        return PatchParameters(*(field[patches, images] for field in self))


class BatchMultiPatch(nn.Module):
    """uint8 images (b, 3, H, W) -> float32 patches (n, b, 3, s, s), augmented and normalised.

    The result is channels_last once its first two dimensions are flattened (``patches.flatten(0, 1)``, a view).
    `forward` draws and applies; a caller who splits a batch over processes or chunks draws for the global batch with
    `sample`, cuts with `PatchParameters.select` and calls `make` on each part: the patches are those of the whole.

    Computes in float32 also under autocast. A lowered float32 matmul precision on CUDA ("high") touches resizing and
    blur only, by less than half a grey level.

    Args:
        num_patches, patch_size, output_size, **settings: the fields of `PatchRecipe`.

    Raises:
        ValueError: for impossible settings, and, when called, for images that are not uint8 (b, 3, H, W), that are
            smaller than the patch, or that do not match the parameters.

    >>> images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> BatchMultiPatch(num_patches=4, patch_size=16, output_size=24)(images).shape
    torch.Size([4, 8, 3, 24, 24])
    """

    def __init__(
        self,
        num_patches: int = 20,
        patch_size: int | None = 16,
        output_size: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.recipe = PatchRecipe(num_patches, patch_size, output_size, **settings)

    @classmethod
    def from_recipe(cls, recipe: PatchRecipe) -> "BatchMultiPatch":
        return cls(**vars(recipe))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Patches with parameters drawn from ``generator`` (on the CPU; default: torch's global one)."""
        _check_images(images)
        batch_size, _, height, width = images.shape
        return self.make(images, self.sample(batch_size, height, width, generator))

    def make(self, images: Tensor, params: PatchParameters) -> Tensor:
        """The patches of uint8 images (b, 3, H, W) that the parameters (n, b) describe."""
        _check_images(images)
        if params.flip.shape[1] != len(images):
            raise ValueError(
                f"parameters are for {params.flip.shape[1]} images, the batch has {len(images)}: "
                "cut both alike, with params.select(images=...)"
            )
        with torch.autocast(images.device.type, enabled=False):
            return make_patches(images, params, self.recipe)

    def sample(
        self, batch_size: int, height: int, width: int, generator: torch.Generator | None = None
    ) -> PatchParameters:
        """Draws the parameters of ``num_patches`` patches for each of ``batch_size`` images of height x width pixels."""
        return sample_parameters(self.recipe, batch_size, height, width, generator)

    def extra_repr(self) -> str:
        return str(self.recipe)


# ------------------------------------------------------------------------------------------------- drawing parameters


def sample_parameters(
    recipe: PatchRecipe,
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
) -> PatchParameters:
    """Parameters for ``batch_size`` images of height x width pixels, from a CPU generator."""
    recipe.check_image(height, width)
    shape = (recipe.num_patches, batch_size)

    def uniform(low: float, high: float, *lead: int) -> Tensor:
        return (
            torch.rand(*lead, *shape, generator=generator, dtype=torch.float64) * (high - low) + low
        )

    def happens(probability: float) -> Tensor:
        return uniform(0, 1) < probability

    if recipe.patch_size is None:
        top, left, box_height, box_width = _random_resized_boxes(recipe, height, width, uniform)
    else:
        box_height = box_width = torch.full(shape, recipe.patch_size)
        top = _offset(uniform(0, 1), height - box_height)
        left = _offset(uniform(0, 1), width - box_width)
    *strengths, hue = recipe.jitter
    factors = [uniform(max(0.0, 1 - v), 1 + v) for v in strengths] + [uniform(-hue, hue)]
    return PatchParameters(
        top=top,
        left=left,
        height=box_height,
        width=box_width,
        flip=happens(recipe.flip_prob),
        jitter=happens(recipe.jitter_prob),
        order=uniform(0, 1, 4).argsort(0).movedim(0, -1).contiguous(),
        factors=torch.stack(factors, -1).float(),
        grey=happens(recipe.grey_prob),
        blur=happens(recipe.blur_prob),
        sigma=uniform(*recipe.blur_sigma).float(),
        solarize=happens(recipe.solarize_prob),
    )


def _offset(fraction: Tensor, room: Tensor) -> Tensor:
    """Uniform whole number from 0 to ``room`` from a float64 ``fraction`` in [0, 1) (float32 could round up to 1)."""
    return (fraction * (room + 1)).long()


def _random_resized_boxes(
    recipe: PatchRecipe, height: int, width: int, uniform
) -> tuple[Tensor, ...]:
    """(top, left, height, width) of random-resized crops after torchvision's rule, for all patches at once.

    Ten tries of area and aspect ratio, of which the first that fits is taken; if none fits, the largest central crop
    whose aspect ratio is allowed.
    """
    low, high = recipe.ratio
    area = height * width * uniform(*recipe.scale, 10)
    aspect = uniform(math.log(low), math.log(high), 10).exp()
    widths = (area * aspect).sqrt().round().long()
    heights = (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    # The fallback stands in line as an eleventh try, which always fits.
    last = torch.ones_like(fits[:1])
    widths = torch.cat((widths, last * max(1, min(width, round(height * high)))))
    heights = torch.cat((heights, last * max(1, min(height, round(width / low)))))
    tries = torch.arange(11).view(11, 1, 1)
    first = torch.where(torch.cat((fits, last)), tries, 10).amin(0, keepdim=True)
    box_height, box_width = heights.gather(0, first)[0], widths.gather(0, first)[0]

    room_y, room_x = height - box_height, width - box_width
    centred = first[0] == 10
    top = torch.where(centred, room_y // 2, _offset(uniform(0, 1), room_y))
    left = torch.where(centred, room_x // 2, _offset(uniform(0, 1), room_x))
    return top, left, box_height, box_width


# ---------------------------------------------------------------------------------------------------- making patches


def make_patches(images: Tensor, params: PatchParameters, recipe: PatchRecipe) -> Tensor:
    """uint8 (b, 3, H, W) and parameters (n, b) -> float32 (n, b, 3, s, s), the whole recipe."""
    n, b = params.flip.shape
    size, device = recipe.output_size, images.device
    height, width = images.shape[-2:]

    # A flipped crop is a crop of the mirrored image: mirroring b images is cheaper than flipping n * b patches.
    source = torch.cat((images, images.flip(-1))).contiguous()
    flat = PatchParameters(*(field.flatten(0, 1) for field in params))
    image = torch.arange(b).repeat(n) + b * flat.flip
    left = torch.where(flat.flip, width - flat.width - flat.left, flat.left)
    boxes = torch.stack((image, flat.top, left, flat.height, flat.width))

    # In order of the hue shift's place (4: no jitter), then of the crop's area, so that most blocks hold patches much alike.
    hue_at = torch.where(flat.jitter, (flat.order == HUE).int().argmax(-1), 4)
    index = (hue_at * (height * width + 1) + flat.height * flat.width).argsort(stable=True)
    flat, boxes = PatchParameters(*(field[index] for field in flat)), boxes[:, index]
    one_size = bool((boxes[3:] == boxes[3:, :1]).all())

    scale = torch.tensor(recipe.std).reciprocal()
    scale, shift = _send(torch.stack((scale, -torch.tensor(recipe.mean) * scale)), device).view(
        2, 3, 1, 1
    )
    device_boxes, table, device_index = (
        _send(tensor, device) for tensor in (boxes, _jitter_table(flat), index)
    )

    out = torch.empty(n * b, size, size, 3, device=device)
    block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
    limit = max(1, block_bytes // (12 * max(size * size, int((boxes[3] * boxes[4]).max()))))
    hue_at = hue_at[index]
    for block in map(slice, range(0, n * b, limit), range(limit, n * b + limit, limit)):
        box, window = device_boxes[:, block], boxes[3:, block].amax(1).tolist()
        if not one_size:
            x = resized_crops(source, box, window, size, recipe.interpolation)
        elif window == [size, size]:
            x = crops(source, *box[:3], *window)
        else:
            x = resize(crops(source, *box[:3], *window), size, recipe.interpolation)
        color_jitter(x, torch.bincount(hue_at[block], minlength=5).tolist(), table[:, :, block])
        if len(subset := flat.grey[block].nonzero()[:, 0]):
            subset = _send(subset, device)
            x.index_copy_(0, subset, grey(x[subset])[:, None].expand(-1, 3, -1, -1))
        if len(subset := flat.blur[block].nonzero()[:, 0]):
            sigma, subset = _send(flat.sigma[block][subset], device), _send(subset, device)
            x.index_copy_(
                0, subset, gaussian_blur(x[subset], sigma, blur_radius(recipe.blur_sigma[1], size))
            )
        if len(subset := flat.solarize[block].nonzero()[:, 0]):
            subset = _send(subset, device)
            x.index_copy_(0, subset, solarize(x[subset]))
        x.mul_(scale).add_(shift)
        out.index_copy_(0, device_index[block], x.permute(0, 2, 3, 1).contiguous())
    return out.view(n, b, size, size, 3).permute(0, 1, 4, 2, 3)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """CPU tensor -> device, without waiting for it (which on CUDA needs pinned memory)."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            "images must be a uint8 tensor (b, 3, H, W) with b of at least 1, values 0 to 255, got "
            f"{images.dtype} {tuple(images.shape)}"
        )


# ------------------------------------------------------------------------------------------------ crops and resizing


def crops(
    source: Tensor, image: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> Tensor:
    """Windows of uint8 ``source`` (m, 3, H, W) of one size -> float32 (k, 3, height, width) in [0, 1]."""
    _, channels, rows, columns = source.shape
    # All windows at once, as a view: one starts at every pixel (those that wrap around are never asked for). Selecting
    # from it copies whole rows, in bytes, and is several times faster than indexing every pixel.
    reach = (channels - 1) * rows * columns + (height - 1) * columns + width
    windows = source.as_strided(
        (source.numel() - reach + 1, channels, height, width), (1, rows * columns, columns, 1)
    )
    return (
        windows.index_select(0, (image * channels * rows + top) * columns + left).float().div_(255)
    )


def resize(x: Tensor, size: int, interpolation: str) -> Tensor:
    """(k, 3, h, w) -> (k, 3, size, size), with antialiasing, within [0, 1] (bicubic overshoots, and 8-bit pixels cannot)."""
    if size <= MATRIX_SIZE:
        whole = torch.zeros(1, device=x.device)
        rows, columns = (
            resample_weights(whole, whole + length, length, size, interpolation)[0]
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
    """Boxes of uint8 ``source`` (m, 3, H, W) -> float32 (k, 3, size, size) in [0, 1], resized with antialiasing.

    Args:
        box: int64 (5, k), rows image, top, left, height, width.
        window: the greatest height and width of the boxes.
    """
    image, top, left, box_height, box_width = box
    height, width = window
    first_row, first_column = (
        top.clamp(max=source.shape[-2] - height),
        left.clamp(max=source.shape[-1] - width),
    )
    rows = resample_weights(top - first_row, box_height, height, size, interpolation)
    columns = resample_weights(left - first_column, box_width, width, size, interpolation)
    x = crops(source, image, first_row, first_column, height, width)
    return separable(x, rows[:, None], columns[:, None]).clamp_(0, 1)


def resample_weights(
    start: Tensor, length: Tensor, source: int, output: int, interpolation: str
) -> Tensor:
    """Weights (k, output, source) that resize the pixels [start, start + length) of an axis to ``output`` pixels.

    PIL's rule, as in torchvision's ``antialias=True``: a triangle (bilinear) or a cubic with a = -0.5 (bicubic) around
    the centre of each output pixel, stretched when shrinking, cut off at the box and normalised.

    Args:
        start, length: (k,) in source pixels.
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
    places = weights.new_zeros(
        len(weights), output, taps + source + taps
    )  # pixels beyond the axis have weight 0
    return places.scatter_(-1, (pixel + start).long() + taps, weights)[..., taps:-taps]


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A linear map of columns and of rows: (k, 3, h, w), (..., s, h), (..., s, w) -> (k, 3, s, s)."""
    return rows @ (x @ columns.mT)


# ------------------------------------------------------------------------------------------------------------ colour


def grey(x: Tensor) -> Tensor:
    """Luma after ITU-R 601: RGB (k, 3, ...) -> (k, ...)."""
    red, green, blue = x.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _jitter_table(block: PatchParameters) -> Tensor:
    """Coefficients of the jitter's four places, (4, 3, k, 1): strength, share of grey, share of the mean grey.

    Brightness, contrast and saturation blend a patch with black, with its mean grey and with its grey image:
    clamp(f x + (1 - f) other). The last two entries are 1 - f for the operation that has this `other`, and else 0.
    """
    strength = block.factors.gather(-1, block.order)
    rest = 1 - strength
    table = torch.stack(
        (strength, rest * (block.order == SATURATION), rest * (block.order == CONTRAST))
    )
    return table.permute(2, 0, 1).unsqueeze(-1).contiguous()


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
