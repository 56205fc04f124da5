"""The settings of one augmentation augmentation, shared by the PIL and the batched pipeline.

Defaults are EMP-SSL's for CIFAR (arXiv 2304.03977 and the published code): 16x16 patches of a 32x32
image, flipped, colour jittered, greyed, blurred, solarised and normalised, in this order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class PatchAugmentation:
    """How patches are cut out of an image and augmented. Checked on construction; sequences become tuples.

    A patch is cut, resized to ``output_size``, flipped, jittered (the four operations in random order), greyed, blurred,
    solarised at half of the range, and normalised; each step but the first two happens with its own probability.

    Args:
        num_patches: patches per image, n.
        patch_size: side of the square crop in source pixels, at a uniformly drawn position. ``None``: random-resized
            crops after ``scale`` and ``ratio`` (torchvision's RandomResizedCrop rule), which are not used otherwise.
        output_size: side s of the finished patch in pixels.
        scale: lowest and highest share of the image's area in a random-resized crop, within (0, 1].
        ratio: lowest and highest width / height of a random-resized crop.
        interpolation: "bilinear" or "bicubic", both antialiased as PIL does it.
        flip_prob: probability of a horizontal flip.
        jitter_prob: probability of the colour jitter.
        jitter: strength of brightness, contrast, saturation (factors are uniform in [max(0, 1 - v), 1 + v]) and hue
            (shift uniform in [-v, v], in turns of the colour wheel, at most 0.5).
        grey_prob: probability of dropping the colour.
        blur_prob: probability of a Gaussian blur.
        blur_sigma: lowest and highest standard deviation of the blur, in output pixels.
        solarize_prob: probability of inverting all values of 128 and above.
        mean: per-channel mean subtracted at the end, for values in [0, 1].
        std: per-channel divisor after it.

    Raises:
        ValueError: for a setting that cannot work; the message says which, and what to use.
    """

    num_patches: int = 20
    patch_size: int | None = 16
    output_size: int = 32
    scale: tuple[float, float] = (0.25, 0.25)
    ratio: tuple[float, float] = (1.0, 1.0)
    interpolation: str = "bilinear"
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    grey_prob: float = 0.2
    blur_prob: float = 0.1
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("num_patches", "output_size"):
            _check_count(name, getattr(self, name))
        if self.patch_size is not None:
            _check_count("patch_size", self.patch_size, " (or None for random-resized crops)")
        for name, length in (
            ("scale", 2),
            ("ratio", 2),
            ("jitter", 4),
            ("blur_sigma", 2),
            ("mean", 3),
            ("std", 3),
        ):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), length))
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be (low, high) with 0 < low <= high, got {(low, high)}"
                )
        if self.scale[1] > 1:
            raise ValueError(
                f"scale is a share of the image's area, so at most 1, got {self.scale}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        for name in ("flip_prob", "jitter_prob", "grey_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, so a number from 0 to 1, got {value!r}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                "jitter is (brightness, contrast, saturation, hue): none below 0, and hue at most 0.5 "
                f"(half a turn of the colour wheel), got {self.jitter}"
            )
        if min(self.std) <= 0:
            raise ValueError(
                f"std divides the pixels, so every entry must be above 0, got {self.std}"
            )

    def plain(self) -> "PatchAugmentation":
        """The same crops, resized and normalised, without flip or colour changes (plain bag of features). The strengths of what is off are the
        same for all, so that augmentations with the same crops are equal."""
        return dataclasses.replace(
            self,
            flip_prob=0.0,
            jitter_prob=0.0,
            jitter=(0.0,) * 4,
            grey_prob=0.0,
            blur_prob=0.0,
            blur_sigma=(0.1, 2.0),
            solarize_prob=0.0,
        )

    def with_patches(self, num_patches: int) -> "PatchAugmentation":
        """The same augmentation with another number of patches per image."""
        return dataclasses.replace(self, num_patches=num_patches)

    def check_image(self, height: int, width: int) -> None:
        """Raises ValueError if patches cannot be cut from an image of this size in pixels."""
        if min(height, width) < 1:
            raise ValueError(
                f"images must have at least one pixel, got height x width = {height} x {width}"
            )
        if self.patch_size is not None and self.patch_size > min(height, width):
            raise ValueError(
                f"patch_size {self.patch_size} does not fit into images of height x width = {height} x {width}; use a "
                f"patch_size of at most {min(height, width)}, or larger images"
            )


# What an entry may hold: solo-learn's keys, and our extras (patch_size, scale, ratio, interpolation, rrc.ratio, gaussian_blur.sigma,
# mean, std). A name stands for a plain value, a tuple of names for a nested group.
_GROUPS = {
    "rrc": ("enabled", "crop_min_scale", "crop_max_scale", "ratio"),
    "color_jitter": ("enabled", "prob", "brightness", "contrast", "saturation", "hue"),
    "grayscale": ("enabled", "prob"),
    "gaussian_blur": ("enabled", "prob", "sigma"),
    "solarization": ("enabled", "prob"),
    "equalization": ("enabled", "prob"),
    "horizontal_flip": ("enabled", "prob"),
}
_VALUES = ("crop_size", "num_crops", "patch_size", "scale", "ratio", "interpolation", "mean", "std")


def augmentation_from_config(entry: Mapping[str, Any]) -> PatchAugmentation:
    """One entry of the ``augmentations`` list in a solo-learn YAML (schema of the repository head) as a augmentation.

    Keys that are absent mean what they mean there: probabilities and jitter strengths 0, one crop, of 224 pixels, scale
    0.08 to 1, ratio 3/4 to 4/3, bicubic, sigma 0.1 to 2. Normalisation is 0.5 unless ``mean`` and ``std`` are given.
    Without ``patch_size``, ``rrc.enabled`` false is the whole image resized (of a non-square image the largest central
    square). In the other groups some of solo-learn's augmentations have ``enabled`` too, which it does not read: ``prob`` decides.

    Args:
        entry: nested mapping with the keys ``rrc, color_jitter, grayscale, gaussian_blur, solarization, equalization,
            horizontal_flip, crop_size, num_crops``, and our ``patch_size``, ``scale`` (of patches by their share of the image)
            and their ``ratio`` (default: square), ``interpolation, mean, std, rrc.ratio, gaussian_blur.sigma``.

    Raises:
        ValueError: for unknown keys (all are named), for ``equalization.prob`` above 0, for a group with ``enabled`` false and a ``prob``
            above 0, for both ``patch_size`` and ``rrc.enabled``, and for whatever `PatchAugmentation` refuses.

    >>> augmentation_from_config({"patch_size": 16, "crop_size": 32, "num_crops": 20}).num_patches
    20
    """
    _check_keys(entry)
    groups = {name: entry.get(name) or {} for name in _GROUPS}
    rrc, jitter = groups["rrc"], groups["color_jitter"]
    if groups["equalization"].get("prob", 0):
        raise ValueError(
            "equalization is not part of the batched pipeline: set equalization.prob to 0"
        )
    patch_size, patch_scale = entry.get("patch_size"), entry.get("scale")
    if patch_scale is not None and (patch_size is not None or rrc.get("enabled", False)):
        raise ValueError(
            "scale draws patches by their share of the image: set patch_size to null and leave rrc out"
        )
    if rrc.get("enabled", False):
        if patch_size is not None:
            raise ValueError(
                f"patch_size {patch_size} asks for crops of a fixed size and rrc.enabled for random-resized ones: "
                "set rrc.enabled to false or leave patch_size out"
            )
        scale = (rrc.get("crop_min_scale", 0.08), rrc.get("crop_max_scale", 1.0))
        ratio = rrc.get("ratio", (3 / 4, 4 / 3))
    else:
        scale, ratio = (
            (1.0, 1.0) if patch_scale is None else patch_scale,
            entry.get("ratio") or (1.0, 1.0),
        )
    return PatchAugmentation(
        num_patches=entry.get("num_crops", 1),
        patch_size=patch_size,
        output_size=entry.get("crop_size", 224),
        scale=scale,
        ratio=ratio,
        interpolation=entry.get("interpolation", "bicubic"),
        flip_prob=groups["horizontal_flip"].get("prob", 0.0),
        jitter_prob=jitter.get("prob", 0.0),
        jitter=tuple(
            jitter.get(name, 0.0) for name in ("brightness", "contrast", "saturation", "hue")
        ),
        grey_prob=groups["grayscale"].get("prob", 0.0),
        blur_prob=groups["gaussian_blur"].get("prob", 0.0),
        blur_sigma=groups["gaussian_blur"].get("sigma", (0.1, 2.0)),
        solarize_prob=groups["solarization"].get("prob", 0.0),
        mean=entry.get("mean", (0.5, 0.5, 0.5)),
        std=entry.get("std", (0.5, 0.5, 0.5)),
    )


def _check_keys(entry: Mapping[str, Any]) -> None:
    """ValueError naming every key of an augmentation entry that nobody reads, and groups that are not mappings."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"an augmentation must be a mapping of settings, got {entry!r}")
    unknown = [str(name) for name in entry if name not in _GROUPS and name not in _VALUES]
    for name, known in _GROUPS.items():
        group = entry.get(name) or {}
        if not isinstance(group, Mapping):
            raise ValueError(
                f"augmentation {name} must be a mapping with keys {', '.join(known)}, got {group!r}"
            )
        unknown += [f"{name}.{key}" for key in group if key not in known]
        if not group.get("enabled", True) and group.get("prob", 0):
            raise ValueError(
                f"{name}.enabled is false and {name}.prob {group['prob']}: set {name}.prob to 0, which is what decides"
            )
    if unknown:
        known = list(_VALUES) + [f"{name}.{key}" for name, keys in _GROUPS.items() for key in keys]
        raise ValueError(
            f"unknown augmentation keys: {', '.join(unknown)}; known are {', '.join(known)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(name: str, value: Any, hint: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1{hint}, got {value!r}")


def _numbers(name: str, value: Any, length: int) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or len(value) != length or not all(map(_is_number, value)):
        raise ValueError(f"{name} must be {length} numbers, got {value!r}")
    return tuple(value)
