"""The settings of an augmentation, shared by the PIL and the batched pipeline.

Defaults are EMP-SSL's for CIFAR (arXiv 2304.03977 and the published code): 16x16 patches of a 32x32
image, flipped, colour jittered, greyed, blurred, solarised and normalised, in this order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class PatchAugmentation:
    """How patches are cut out of an image and augmented.

    A patch is cut, resized to ``output_size``, flipped, jittered (the four operations in random
    order), greyed, blurred, solarised at half of the range, and normalised. Flip, jitter, grey,
    blur and solarisation each happen with a probability of their own. Values are checked when this
    is made, and sequences become tuples.

    Args:
        num_patches: patches per image, n.
        patch_size: side of the square crop in source pixels, at a uniformly drawn position.
            ``None``: random-resized crops after ``scale`` and ``ratio`` (the rule of torchvision's
            RandomResizedCrop), which are not used otherwise.
        output_size: side s of the finished patch in pixels.
        scale: lowest and highest share of the image's area in a random-resized crop, in (0, 1].
        ratio: lowest and highest width / height of a random-resized crop.
        interpolation: "bilinear" or "bicubic", both antialiased as PIL does it.
        flip_prob: probability of a horizontal flip.
        jitter_prob: probability of the colour jitter.
        jitter: strength of brightness, contrast, saturation and hue. The first three draw a factor
            from [max(0, 1 - v), 1 + v], the hue a shift from [-v, v], in turns of the colour
            wheel, v at most 0.5; all uniformly.
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
        lengths = {"scale": 2, "ratio": 2, "jitter": 4, "blur_sigma": 2, "mean": 3, "std": 3}
        for name, length in lengths.items():
            object.__setattr__(self, name, _numbers(name, getattr(self, name), length))
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be (low, high) with 0 < low <= high, got {(low, high)}"
                )
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image's area, at most 1, got {self.scale}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"interpolation must be one of {known}, got {self.interpolation!r}")
        for name in ("flip_prob", "jitter_prob", "grey_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, so a number from 0 to 1, got {value!r}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                "jitter is (brightness, contrast, saturation, hue): none below 0, and hue at most "
                f"0.5 (half a turn of the colour wheel), got {self.jitter}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std divides the pixels, so all must be above 0, got {self.std}")

    def plain(self) -> "PatchAugmentation":
        """The same crops, resized and normalised, without flip or colour changes.

        The settings of what is off are the same for all, so that augmentations with the same crops
        have equal plain ones.
        """
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
        size = f"height x width = {height} x {width}"
        side = min(height, width)
        if side < 1:
            raise ValueError(f"images must have at least one pixel, got {size}")
        if self.patch_size is not None and self.patch_size > side:
            raise ValueError(
                f"patch_size {self.patch_size} does not fit into images of {size}; use a "
                f"patch_size of at most {side}, or larger images"
            )


# The keys that an entry of a configuration may hold. patch_size, scale, ratio, interpolation, mean,
# std, rrc.ratio and gaussian_blur.sigma are ours, the others solo-learn's.
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
    """An entry of the ``augmentations`` list of a configuration (schema of solo-learn 1.0.6).

    Absent keys mean what they mean to solo-learn: probabilities and jitter strengths 0, one crop,
    of 224 pixels, scale 0.08 to 1, ratio 3/4 to 4/3, bicubic, sigma 0.1 to 2. ``mean`` and ``std``
    are 0.5 if absent. Without ``patch_size``, and with ``rrc.enabled`` false, the whole image is
    resized (of a non-square image the largest central square). Some of solo-learn's entries have
    ``enabled`` in other groups, too. solo-learn does not read it there: ``prob`` decides.

    Args:
        entry: nested mapping with solo-learn's keys ``rrc, color_jitter, grayscale,
            gaussian_blur, solarization, equalization, horizontal_flip, crop_size, num_crops``, and
            ours: ``patch_size``, ``scale`` (of patches by their share of the image) and their
            ``ratio`` (default: square), ``interpolation, mean, std, rrc.ratio,
            gaussian_blur.sigma``.

    Raises:
        ValueError: for unknown keys (all are named), for ``equalization.prob`` above 0, for a group
            with ``enabled`` false and a ``prob`` above 0, for both ``patch_size`` and
            ``rrc.enabled``, for ``scale`` beside either, and for what `PatchAugmentation` refuses.

    >>> augmentation_from_config({"patch_size": 16, "crop_size": 32, "num_crops": 20}).num_patches
    20
    """
    _check_keys(entry)
    groups = {name: entry.get(name) or {} for name in _GROUPS}
    rrc, jitter, blur = groups["rrc"], groups["color_jitter"], groups["gaussian_blur"]
    if groups["equalization"].get("prob", 0):
        raise ValueError("equalization is not supported: set equalization.prob to 0")
    patch_size, patch_scale = entry.get("patch_size"), entry.get("scale")
    random_resized = rrc.get("enabled", False)
    if patch_scale is not None and (patch_size is not None or random_resized):
        raise ValueError(
            "scale draws patches by their share of the image: set patch_size to null and leave "
            "rrc out"
        )
    if random_resized and patch_size is not None:
        raise ValueError(
            f"patch_size {patch_size} asks for crops of a fixed size and rrc.enabled for "
            "random-resized ones: set rrc.enabled to false or leave patch_size out"
        )
    if random_resized:
        scale = (rrc.get("crop_min_scale", 0.08), rrc.get("crop_max_scale", 1.0))
        ratio = rrc.get("ratio", (3 / 4, 4 / 3))
    else:
        scale = (1.0, 1.0) if patch_scale is None else patch_scale
        ratio = entry.get("ratio") or (1.0, 1.0)
    strengths = ("brightness", "contrast", "saturation", "hue")
    return PatchAugmentation(
        num_patches=entry.get("num_crops", 1),
        patch_size=patch_size,
        output_size=entry.get("crop_size", 224),
        scale=scale,
        ratio=ratio,
        interpolation=entry.get("interpolation", "bicubic"),
        flip_prob=groups["horizontal_flip"].get("prob", 0.0),
        jitter_prob=jitter.get("prob", 0.0),
        jitter=tuple(jitter.get(name, 0.0) for name in strengths),
        grey_prob=groups["grayscale"].get("prob", 0.0),
        blur_prob=blur.get("prob", 0.0),
        blur_sigma=blur.get("sigma", (0.1, 2.0)),
        solarize_prob=groups["solarization"].get("prob", 0.0),
        mean=entry.get("mean", (0.5, 0.5, 0.5)),
        std=entry.get("std", (0.5, 0.5, 0.5)),
    )


def _check_keys(entry: Mapping[str, Any]) -> None:
    """ValueError for keys that nobody reads (all are named) and groups that are not mappings."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"an augmentation must be a mapping of settings, got {entry!r}")
    unknown = [str(name) for name in entry if name not in _GROUPS and name not in _VALUES]
    for name, keys in _GROUPS.items():
        group = entry.get(name) or {}
        if not isinstance(group, Mapping):
            raise ValueError(
                f"augmentation {name} must be a mapping with keys {', '.join(keys)}, got {group!r}"
            )
        unknown += [f"{name}.{key}" for key in group if key not in keys]
        if not group.get("enabled", True) and group.get("prob", 0):
            raise ValueError(
                f"{name}.enabled is false and {name}.prob {group['prob']}: set {name}.prob to 0, "
                "which is what decides"
            )
    if unknown:
        known = [*_VALUES, *(f"{name}.{key}" for name, keys in _GROUPS.items() for key in keys)]
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
