"""One PIL image to n augmented patches, by torchvision's and PIL's operations: the reference.

The augmentation of EMP-SSL (arXiv 2304.03977). `BatchMultiPatch` does the same on a whole batch and
is what training uses. This one is what it is tested against. It also fits solo-learn's pipelines,
which chain callables that return lists.
"""

from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from .augmentation import PatchAugmentation


class MultiPatchTransform:
    """PIL image -> list of ``num_patches`` float32 tensors ``(3, output_size, output_size)``.

    They are augmented and normalised. Random numbers come from torch's default CPU generator, which
    DataLoader seeds per worker. Images in other modes (grey, palette, alpha) are converted to RGB.

    Args:
        num_patches, patch_size, output_size, **settings: the fields of `PatchAugmentation`.

    Raises:
        ValueError: for impossible settings, and, when called, for an image smaller than the patch.
    """

    def __init__(
        self,
        num_patches: int = 20,
        patch_size: int | None = 16,
        output_size: int = 32,
        **settings: Any,
    ) -> None:
        self.augmentation = PatchAugmentation(num_patches, patch_size, output_size, **settings)
        self.transform = _compose(self.augmentation)

    @classmethod
    def from_augmentation(cls, augmentation: PatchAugmentation) -> "MultiPatchTransform":
        return cls(**vars(augmentation))

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        self.augmentation.check_image(image.height, image.width)
        image = image.convert("RGB")
        return [self.transform(image) for _ in range(self.augmentation.num_patches)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.augmentation})"


def _compose(a: PatchAugmentation) -> transforms.Compose:
    """The operations on one patch, in the augmentation's order."""
    interpolation = transforms.InterpolationMode(a.interpolation)
    size = (a.output_size, a.output_size)
    if a.patch_size is None:
        crop = [transforms.RandomResizedCrop(size, a.scale, a.ratio, interpolation)]
    else:
        crop = [transforms.RandomCrop(a.patch_size), transforms.Resize(size, interpolation)]
    return transforms.Compose(
        [
            *crop,
            transforms.RandomHorizontalFlip(a.flip_prob),
            transforms.RandomApply([transforms.ColorJitter(*a.jitter)], a.jitter_prob),
            transforms.RandomGrayscale(a.grey_prob),
            transforms.RandomApply([_RandomBlur(*a.blur_sigma)], a.blur_prob),
            transforms.RandomApply([ImageOps.solarize], a.solarize_prob),
            transforms.ToTensor(),
            transforms.Normalize(a.mean, a.std),
        ]
    )


class _RandomBlur:
    """PIL's Gaussian blur, its standard deviation in pixels uniform in [low, high]."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(()).uniform_(self.low, self.high).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))
