"""A uint8 batch of images -> n augmented patches of each, on any device: the fast path, used for training.

Same augmentation as `MultiPatchTransform` (EMP-SSL, arXiv 2304.03977), every patch with its own parameters. These
are drawn on the CPU, whatever the device, for two reasons: the patches do not depend on the device, and which of them
are blurred, greyed and so on is known without asking the accelerator (no synchronisation). What follows is one straight
line over blocks of patches. They are in order of the hue shift's place in the jitter, so that the costly hue rotation
runs once per patch, on slices; the other three operations are one formula with per-patch coefficients.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .augmentation import PatchAugmentation
from .ops.blur import blur_radius, gaussian_blur
from .ops.colour import color_jitter, grey, solarize
from .ops.crop import crops, resize, resized_crops

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the operations of the jitter

# Bytes of one float32 copy of a block. On a CPU a few such copies should stay in the last-level cache, but much smaller
# blocks pay for more calls; on an accelerator blocks only bound the memory (2,000 patches of 32x32 are one): a fast GPU
# is done with an operation on all of them about as soon as the host has launched the next.
CPU_BLOCK_BYTES = 2**22
DEVICE_BLOCK_BYTES = 2**28


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
        num_patches, patch_size, output_size, **settings: the fields of `PatchAugmentation`.

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
        self.augmentation = PatchAugmentation(num_patches, patch_size, output_size, **settings)

    @classmethod
    def from_augmentation(cls, augmentation: PatchAugmentation) -> "BatchMultiPatch":
        return cls(**vars(augmentation))

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
            return make_patches(images, params, self.augmentation)

    def sample(
        self, batch_size: int, height: int, width: int, generator: torch.Generator | None = None
    ) -> PatchParameters:
        """Draws the parameters of ``num_patches`` patches for each of ``batch_size`` images of height x width pixels."""
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
        return (
            torch.rand(*lead, *shape, generator=generator, dtype=torch.float64) * (high - low) + low
        )

    def happens(probability: float) -> Tensor:
        return uniform(0, 1) < probability

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


def _offset(fraction: Tensor, room: Tensor) -> Tensor:
    """Uniform whole number from 0 to ``room`` from a float64 ``fraction`` in [0, 1) (float32 could round up to 1)."""
    return (fraction * (room + 1)).long()


def _random_resized_boxes(
    augmentation: PatchAugmentation, height: int, width: int, uniform
) -> tuple[Tensor, ...]:
    """(top, left, height, width) of random-resized crops after torchvision's rule, for all patches at once.

    Ten tries of area and aspect ratio, of which the first that fits is taken; if none fits, the largest central crop
    whose aspect ratio is allowed.
    """
    low, high = augmentation.ratio
    area = height * width * uniform(*augmentation.scale, 10)
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


def make_patches(
    images: Tensor, params: PatchParameters, augmentation: PatchAugmentation
) -> Tensor:
    """uint8 (b, 3, H, W) and parameters (n, b) -> float32 (n, b, 3, s, s), the whole augmentation."""
    n, b = params.flip.shape
    size, device = augmentation.output_size, images.device
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

    scale = torch.tensor(augmentation.std).reciprocal()
    scale, shift = _send(
        torch.stack((scale, -torch.tensor(augmentation.mean) * scale)), device
    ).view(2, 3, 1, 1)
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
            x = resized_crops(source, box, window, size, augmentation.interpolation)
        elif window == [size, size]:
            x = crops(source, *box[:3], *window)
        else:
            x = resize(crops(source, *box[:3], *window), size, augmentation.interpolation)
        color_jitter(x, torch.bincount(hue_at[block], minlength=5).tolist(), table[:, :, block])
        if len(subset := flat.grey[block].nonzero()[:, 0]):
            subset = _send(subset, device)
            x.index_copy_(0, subset, grey(x[subset])[:, None].expand(-1, 3, -1, -1))
        if len(subset := flat.blur[block].nonzero()[:, 0]):
            sigma, subset = _send(flat.sigma[block][subset], device), _send(subset, device)
            x.index_copy_(
                0,
                subset,
                gaussian_blur(x[subset], sigma, blur_radius(augmentation.blur_sigma[1], size)),
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
