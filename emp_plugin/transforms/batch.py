"""A uint8 batch of images to n augmented patches of each, on any device; used for training.

The augmentation of `MultiPatchTransform` (EMP-SSL, arXiv 2304.03977), every patch with its own
parameters. These are drawn on the CPU, whatever the device, for two reasons: the patches do not
depend on the device, and which of them are blurred, greyed and so on is known without waiting for
the accelerator. `make_patches` applies them to blocks of patches, in one straight line.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .augmentation import PatchAugmentation
from .ops.blur import blur_radius, gaussian_blur, gaussian_taps
from .ops.colour import HUE, color_jitter, grey, jitter_matrices, jitter_table, solarize
from .ops.crop import crops, first_pixels, resize, resized_crops, resized_crops_plan

# Bytes of one float32 copy of a block. On a CPU a few such copies should stay in the last-level
# cache, but much smaller blocks pay for more calls. On an accelerator blocks only bound the memory
# (2,000 patches of 32x32 are one): a fast GPU is done with an operation on all of them about as
# soon as the host has launched the next.
CPU_BLOCK_BYTES = 2**22
DEVICE_BLOCK_BYTES = 2**28


class PatchParameters(NamedTuple):
    """Everything random about a batch's patches: CPU tensors (n, b) unless said otherwise."""

    top: Tensor  # int64, first row of the crop, in source pixels
    left: Tensor  # int64, first column
    height: Tensor  # int64, rows of the crop
    width: Tensor  # int64, columns of the crop
    flip: Tensor  # bool
    jitter: Tensor  # bool
    order: Tensor  # int64 (n, b, 4), operations of the jitter (ops.colour) in order of application
    factors: Tensor  # float32 (n, b, 4), strength per operation; the hue shift's is in turns
    grey: Tensor  # bool
    blur: Tensor  # bool
    sigma: Tensor  # float32, standard deviation of the blur in output pixels
    solarize: Tensor  # bool

    def select(
        self, patches: slice = slice(None), images: slice = slice(None)
    ) -> "PatchParameters":
        """The parameters of some patches (first dimension) of some images (second), as views."""
        return PatchParameters(*(field[patches, images] for field in self))


class BatchMultiPatch(nn.Module):
    """uint8 images (b, 3, H, W) -> float32 patches (n, b, 3, s, s), augmented and normalised.

    The result is channels_last once its first two dimensions are flattened
    (``patches.flatten(0, 1)``, a view).

    `forward` draws and applies. A caller who splits a batch over processes or chunks draws for the
    global batch with `sample`, cuts with `PatchParameters.select` and calls `make` on each part:
    the patches are those of the whole.

    Computes in float32 also under autocast. A lowered float32 matmul precision on CUDA ("high")
    touches resizing, blur and colours.

    Args:
        num_patches, patch_size, output_size, **settings: the fields of `PatchAugmentation`.

    Raises:
        ValueError: for impossible settings, and, when called, for images that are not uint8
            (b, 3, H, W), that are smaller than the patch, or that do not match the parameters.

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
        self.augmentation = PatchAugmentation(num_patches, patch_size, output_size, **settings)

    @classmethod
    def from_augmentation(cls, augmentation: PatchAugmentation) -> "BatchMultiPatch":
        return cls(**vars(augmentation))

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Patches with parameters from ``generator`` (on the CPU; default: torch's global one)."""
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
            return make_patches(images, params, self.augmentation)

    def sample(
        self, batch_size: int, height: int, width: int, generator: torch.Generator | None = None
    ) -> PatchParameters:
        """Draws the parameters of the patches of images of height x width pixels."""
        return sample_parameters(self.augmentation, batch_size, height, width, generator)

    def extra_repr(self) -> str:
        return str(self.augmentation)


def sample_parameters(
    augmentation: PatchAugmentation,
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
) -> PatchParameters:
    """Parameters for ``batch_size`` images of height x width pixels, from a CPU generator."""
    augmentation.check_image(height, width)
    shape = (augmentation.num_patches, batch_size)

    def uniform(low: float, high: float, *lead: int) -> Tensor:
        unit = torch.rand(*lead, *shape, generator=generator, dtype=torch.float64)
        return unit * (high - low) + low

    def happens(probability: float) -> Tensor:
        return uniform(0, 1) < probability

    # The order of the draws decides what a seed gives.
    if augmentation.patch_size is None:
        top, left, box_height, box_width = _random_resized_boxes(
            augmentation, height, width, uniform
        )
    else:
        box_height = box_width = torch.full(shape, augmentation.patch_size)
        top = _offset(uniform(0, 1), height - box_height)
        left = _offset(uniform(0, 1), width - box_width)
    *strengths, hue = augmentation.jitter
    factors = [uniform(max(0.0, 1 - v), 1 + v) for v in strengths] + [uniform(-hue, hue)]
    return PatchParameters(
        top=top,
        left=left,
        height=box_height,
        width=box_width,
        flip=happens(augmentation.flip_prob),
        jitter=happens(augmentation.jitter_prob),
        order=uniform(0, 1, 4).argsort(0).movedim(0, -1).contiguous(),
        factors=torch.stack(factors, -1).float(),
        grey=happens(augmentation.grey_prob),
        blur=happens(augmentation.blur_prob),
        sigma=uniform(*augmentation.blur_sigma).float(),
        solarize=happens(augmentation.solarize_prob),
    )


def _offset(fraction: Tensor, largest: Tensor) -> Tensor:
    """A float64 fraction in [0, 1) -> a whole number from 0 to ``largest``, uniformly.

    Not from float32, which could round up to 1.
    """
    return (fraction * (largest + 1)).long()


def _random_resized_boxes(
    augmentation: PatchAugmentation, height: int, width: int, uniform: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(top, left, height, width) of random-resized crops by torchvision's rule, each (n, b).

    Ten tries of area and aspect ratio, of which the first that fits is taken. If none fits, the
    largest central crop whose aspect ratio is allowed.
    """
    low, high = augmentation.ratio
    area = height * width * uniform(*augmentation.scale, 10)
    aspect = uniform(math.log(low), math.log(high), 10).exp()
    widths = (area * aspect).sqrt().round().long()
    heights = (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    # The central crop stands in line as an eleventh try, which always fits.
    last = torch.ones_like(fits[:1])
    widths = torch.cat((widths, last * max(1, min(width, round(height * high)))))
    heights = torch.cat((heights, last * max(1, min(height, round(width / low)))))
    tries = torch.arange(11).view(11, 1, 1)
    first = torch.where(torch.cat((fits, last)), tries, 10).amin(0, keepdim=True)
    box_height, box_width = heights.gather(0, first)[0], widths.gather(0, first)[0]

    most_top, most_left = height - box_height, width - box_width
    central = first[0] == 10
    top = torch.where(central, most_top // 2, _offset(uniform(0, 1), most_top))
    left = torch.where(central, most_left // 2, _offset(uniform(0, 1), most_left))
    return top, left, box_height, box_width


def make_patches(
    images: Tensor, params: PatchParameters, augmentation: PatchAugmentation
) -> Tensor:
    """uint8 (b, 3, H, W) and parameters (n, b) -> float32 (n, b, 3, s, s), the augmentation."""
    n, b = params.flip.shape
    height, width = images.shape[-2:]
    size, interpolation = augmentation.output_size, augmentation.interpolation
    radius = blur_radius(augmentation.blur_sigma[1], size)
    device = images.device

    # A flipped crop is a crop of the mirrored image: mirroring b images is cheaper than flipping
    # n * b patches.
    source = torch.cat((images, images.flip(-1))).contiguous()
    params = PatchParameters(*(field.flatten(0, 1) for field in params))
    image = torch.arange(b).repeat(n) + b * params.flip
    left = torch.where(params.flip, width - params.width - params.left, params.left)
    boxes = torch.stack((image, params.top, left, params.height, params.width))

    # Sorted by the hue shift's place (4: no jitter), as the jitter needs them, then by the crop's
    # area, so that most blocks hold patches much alike.
    hue_place = torch.where(params.jitter, (params.order == HUE).int().argmax(-1), 4)
    area = params.height * params.width
    index = (hue_place * (height * width + 1) + area).argsort(stable=True)
    params = PatchParameters(*(field[index] for field in params))
    boxes, hue_place = boxes[:, index], hue_place[index]
    one_size = bool((boxes[3:] == boxes[3:, :1]).all())

    turns, table = params.factors[:, HUE, None], jitter_table(params.order, params.factors)
    if device.type != "cpu":
        table = jitter_matrices(table)
    scale = torch.tensor(augmentation.std).reciprocal()
    shift = -torch.tensor(augmentation.mean) * scale
    scale, shift = scale.view(3, 1, 1), shift.view(3, 1, 1)

    out = torch.empty(n * b, size, size, 3, device=device)
    block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
    patch_bytes = 12 * max(size * size, int(area.max()))  # before or after resizing
    step = max(1, block_bytes // patch_bytes)
    for start in range(0, n * b, step):
        block = slice(start, start + step)
        box = boxes[:, block]
        rows, columns = boxes[3:, block].amax(1).tolist()
        window = rows, columns
        hue_counts = torch.bincount(hue_place[block], minlength=5).tolist()
        changed = params.grey, params.blur, params.solarize
        chosen = [which[block].nonzero()[:, 0] for which in changed]
        if one_size:
            crop = [first_pixels(source.shape, *box[:3])]
        else:
            crop = resized_crops_plan(source.shape, box, window, size, interpolation)
        sigma = params.sigma[block][chosen[1]]
        plan = [
            index[block],
            *chosen,
            turns[block],
            table[:, :, block],
            gaussian_taps(sigma, radius),
        ]
        places, greyed, blurred, inverted, hues, blends, taps, own_scale, own_shift, *crop = _send(
            [*plan, scale, shift, *crop], device
        )
        if one_size:
            [first] = crop
            x = crops(source, first, *window)
            if window != (size, size):
                x = resize(x, size, interpolation)
        else:
            x = resized_crops(source, crop, window, size, interpolation)
        color_jitter(x, hue_counts, hues, blends)
        _change(x, greyed, _grey_image)
        _change(x, blurred, gaussian_blur, taps)
        _change(x, inverted, solarize)
        x.mul_(own_scale).add_(own_shift)
        out.index_copy_(0, places, x.permute(0, 2, 3, 1).contiguous())
    return out.view(n, b, size, size, 3).permute(0, 1, 4, 2, 3)


def _change(
    x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor
) -> None:
    """Applies the operation to the chosen patches of x, in place.

    Args:
        chosen: int64, which they are.
        parameters: further arguments of the operation, one entry per chosen patch.
    """
    if len(chosen):
        x.index_copy_(0, chosen, operation(x[chosen], *parameters))


def _grey_image(x: Tensor) -> Tensor:
    return grey(x)[:, None].expand(-1, 3, -1, -1)


def _send(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors -> device, in one copy, without waiting for it (on CUDA: from pinned memory)."""
    if device.type == "cpu":
        return tensors
    # the wider numbers first, so that all of them lie at multiples of their size
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    parts = [tensors[i].flatten().contiguous().view(torch.uint8) for i in order]
    packed = torch.cat(parts)
    if device.type == "cuda":
        packed = packed.pin_memory()
    sent = packed.to(device, non_blocking=True).split([len(part) for part in parts])
    made = {i: piece.view(tensors[i].dtype).view(tensors[i].shape) for i, piece in zip(order, sent)}
    return [made[i] for i in range(len(tensors))]


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            "images must be a uint8 tensor (b, 3, H, W) with b of at least 1, values 0 to 255, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
