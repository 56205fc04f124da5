"""`BatchMultiPatch` beside PIL in a DataLoader with two workers, and beside kornia.

All start from the same uint8 images in memory and make float32 patches, normalised.

PIL is torchvision's pipeline, `MultiPatchTransform`. Its workers live through all trials, so that
their start is not counted.

kornia (optional, `pip install kornia`) is an AugmentationSequential of the same operations, on each
image repeated n times:

- Like ours it draws per patch: crop position, flip, the four strengths of the jitter, the blur's
  sigma, and which patches are jittered, greyed, blurred and solarised.
- The order of the jitter's operations is one permutation for all n x b patches, where ours is per
  patch. That is so in ColorJiggle as in ColorJitter. The latter, taken here, has torchvision's
  formulas.
- Its shared blur kernel of 17 taps is ours for sigma up to 2.
- Crops are only of a fixed size: it has no antialiasing, so its resizing is ours when it enlarges.
"""

import torch
from common import DEVICE, arguments, report, side_by_side
from PIL import Image
from torch.utils.data import DataLoader

from emp_plugin.transforms import BatchMultiPatch, MultiPatchTransform, PatchAugmentation
from emp_plugin.transforms.ops.blur import blur_radius


class PILPatches(torch.utils.data.Dataset):
    """The patches of each of the uint8 images (b, 3, H, W), made by the PIL pipeline."""

    def __init__(self, images: torch.Tensor, augmentation: PatchAugmentation) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = MultiPatchTransform.from_augmentation(augmentation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(self.images[index])


def kornia_pipeline(augmentation: PatchAugmentation) -> torch.nn.Module:
    """kornia's operations for fixed-size crops: float (k, 3, H, W) in [0, 1] -> (k, 3, s, s)."""
    import kornia.augmentation as K

    size, mode = augmentation.output_size, augmentation.interpolation
    taps = 2 * blur_radius(augmentation.blur_sigma[1], size) + 1
    crop = [K.RandomCrop((augmentation.patch_size, augmentation.patch_size))]
    if augmentation.patch_size != size:
        crop.append(K.Resize((size, size), resample=mode, align_corners=False))
    return K.AugmentationSequential(
        *crop,
        K.RandomHorizontalFlip(p=augmentation.flip_prob),
        K.ColorJitter(*augmentation.jitter, p=augmentation.jitter_prob),
        K.RandomGrayscale(p=augmentation.grey_prob),
        K.RandomGaussianBlur((taps, taps), augmentation.blur_sigma, p=augmentation.blur_prob),
        K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=augmentation.solarize_prob),
        K.Normalize(torch.tensor(augmentation.mean), torch.tensor(augmentation.std)),
    )


def main() -> None:
    args = arguments(__doc__, trials=5)
    bicubic = dict(interpolation="bicubic")
    area = "the area -> 224, bicubic"
    share = dict(ratio=(3 / 4, 4 / 3), **bicubic)
    wide = dict(scale=(0.08, 1.0), **share)
    # Name: augmentation, images, their side, passes over them per trial. A pass is one batch. There
    # is an even number of them, because two workers share them.
    settings = {
        "16 -> 16": (PatchAugmentation(20, 16, 16), 100, 32, 4),
        "16 -> 32": (PatchAugmentation(20, 16, 32), 100, 32, 4),
        "112 -> 224": (PatchAugmentation(20, 112, 224), 10, 224, 2),
        "112 -> 224, bicubic": (PatchAugmentation(20, 112, 224, **bicubic), 10, 224, 2),
        f"a quarter of {area}": (PatchAugmentation(20, None, 224, **share), 10, 224, 2),
        f"0.08 to 1 of {area}": (PatchAugmentation(20, None, 224, **wide), 10, 256, 2),
    }
    cases = {}
    for name, (augmentation, b, side, passes) in settings.items():
        if args.small:
            b, passes = 2, 1
        images = torch.randint(0, 256, (b, 3, side, side), dtype=torch.uint8)
        on_device, transform = images.to(DEVICE), BatchMultiPatch.from_augmentation(augmentation)
        data = PILPatches(images.repeat(passes, 1, 1, 1), augmentation)
        loader = DataLoader(data, b, num_workers=2, persistent_workers=True)

        def ours():
            for _ in range(passes):
                transform(on_device)

        def pil():
            for patches in loader:
                [patch.to(DEVICE) for patch in patches]

        def kornia():
            for _ in range(passes):
                repeated = (on_device.float() / 255).repeat(augmentation.num_patches, 1, 1, 1)
                theirs(repeated)

        references = {"PIL, 2 workers": pil}
        if augmentation.patch_size:
            try:
                theirs = kornia_pipeline(augmentation).to(DEVICE)
            except ImportError:
                print("kornia is not installed (pip install kornia): its case is left out")
            else:
                references["kornia"] = kornia
        for other, reference in references.items():
            case = side_by_side(ours, reference, args.trials)
            patches = augmentation.num_patches * b * passes
            speed = {who: patches / case[who]["median"] for who in ("ours", "reference")}
            case["patches_per_second"] = speed
            print(
                f"{name}, {other}: {speed['ours']:,.0f} patches/s, theirs {speed['reference']:,.0f}"
            )
            cases[f"{other}, {name}, b {b}, n {augmentation.num_patches}"] = case
    report("BatchMultiPatch", cases, args)


if __name__ == "__main__":
    main()
