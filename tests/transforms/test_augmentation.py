"""Settings: EMP-SSL's defaults, solo-learn's YAML entries, and what is refused."""

import dataclasses

import pytest

from emp_plugin.config import augmentations
from emp_plugin.transforms import (
    BatchMultiPatch,
    MultiPatchTransform,
    PatchAugmentation,
    augmentation_from_config,
)


def test_defaults_are_emp_ssls():
    a = PatchAugmentation()
    assert (a.num_patches, a.patch_size, a.output_size) == (20, 16, 32)
    assert (a.flip_prob, a.jitter_prob, a.grey_prob) == (0.5, 0.8, 0.2)
    assert (a.blur_prob, a.solarize_prob) == (0.1, 0.1)
    assert a.jitter == (0.4, 0.4, 0.4, 0.2)
    assert a.blur_sigma == (0.1, 2.0)
    assert a.mean == a.std == (0.5,) * 3


@pytest.mark.parametrize("transform", [BatchMultiPatch, MultiPatchTransform])
def test_both_pipelines_take_the_same_settings(transform):
    made = transform(3, 10, 12, grey_prob=0.7)
    assert made.augmentation == PatchAugmentation(3, 10, 12, grey_prob=0.7)
    assert transform.from_augmentation(made.augmentation).augmentation == made.augmentation
    assert "grey_prob=0.7" in repr(made)


def test_plain_keeps_crops_and_normalisation():
    augmentation = PatchAugmentation(5, None, 24, scale=(0.3, 0.5), mean=(0.1, 0.2, 0.3))
    plain = augmentation.plain()
    off = dict(
        flip_prob=0, jitter_prob=0, jitter=(0, 0, 0, 0), grey_prob=0, blur_prob=0, solarize_prob=0
    )
    assert plain == dataclasses.replace(augmentation, **off)
    same_crops = dict(jitter=(0.8, 0.8, 0.2, 0.1), blur_sigma=(0.5, 1.0))
    assert plain == dataclasses.replace(augmentation, **same_crops).plain()
    assert augmentation.with_patches(7) == dataclasses.replace(augmentation, num_patches=7)


def test_baselines_views_of_digits_differ_in_jitter_alone(config):
    """BYOL has half of it, ReSSL's teacher none; their files repeat everything else."""
    both = augmentations(config("digits/simclr"))[0]
    weaker = dataclasses.replace(both, jitter=(0.2, 0.2, 0, 0))
    assert augmentations(config("digits/byol")) == [weaker]
    student, teacher = augmentations(config("digits/ressl"))
    assert student == both.with_patches(1)
    assert teacher == both.with_patches(1).plain()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_patches=0), "num_patches must be a whole number of at least 1, got 0"),
        (dict(num_patches=-3), "num_patches"),
        (dict(num_patches=2.5), "num_patches"),
        (dict(patch_size=0), "patch_size .*None for random-resized"),
        (dict(output_size=True), "output_size"),
        (dict(scale=(0.5, 0.2)), "scale must be .*low <= high"),
        (dict(scale=(0.0, 1.0)), "scale"),
        (dict(scale=(0.5, 1.2)), "at most 1"),
        (dict(scale=0.5), "scale must be 2 numbers"),
        (dict(ratio=(-1, 1)), "ratio"),
        (dict(interpolation="nearest"), "bilinear, bicubic"),
        (dict(flip_prob=1.5), "flip_prob is a probability"),
        (dict(grey_prob="often"), "grey_prob"),
        (dict(jitter=(0.4, 0.4, 0.4, 0.6)), "hue at most 0.5"),
        (dict(jitter=(0.4, -0.4, 0.4, 0.1)), "none below 0"),
        (dict(jitter=(0.4, 0.4)), "jitter must be 4 numbers"),
        (dict(blur_sigma=(0, 2)), "blur_sigma"),
        (dict(std=(0.5, 0, 0.5)), "std divides"),
        (dict(mean=(0.5, 0.5)), "mean must be 3 numbers"),
    ],
)
def test_refuses_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchAugmentation(**settings)


SIMCLR = {
    "rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 0.9},
    "color_jitter": dict(prob=0.8, brightness=0.8, contrast=0.7, saturation=0.6, hue=0.1),
    "grayscale": {"prob": 0.3},
    "gaussian_blur": {"prob": 0.4},
    "solarization": {"prob": 0.15},
    "equalization": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.45},
    "crop_size": 32,
    "num_crops": 2,
}


def test_solo_learn_entry():
    assert augmentation_from_config(SIMCLR) == PatchAugmentation(
        num_patches=2,
        patch_size=None,
        output_size=32,
        scale=(0.2, 0.9),
        ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
        flip_prob=0.45,
        jitter_prob=0.8,
        jitter=(0.8, 0.7, 0.6, 0.1),
        grey_prob=0.3,
        blur_prob=0.4,
        blur_sigma=(0.1, 2.0),
        solarize_prob=0.15,
    )


def test_solo_learn_entry_with_our_extras():
    ours = {
        "rrc": {"enabled": False},
        "patch_size": 16,
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "gaussian_blur": {"prob": 0.1, "sigma": [0.2, 1.0]},
    }
    a = augmentation_from_config(SIMCLR | ours)
    assert (a.patch_size, a.interpolation, a.blur_sigma) == (16, "bilinear", (0.2, 1.0))
    assert (a.mean, a.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    square = augmentation_from_config({"rrc": {"enabled": True, "ratio": [1, 1]}})
    assert square.ratio == (1, 1)
    assert square.scale == (0.08, 1.0)


def test_enabled_in_a_group_is_accepted():
    """Some of solo-learn's augmentations (vicreg) have it beside prob, which is what decides."""
    groups = ("color_jitter", "grayscale", "gaussian_blur", "solarization", "horizontal_flip")
    enabled = {name: SIMCLR[name] | {"enabled": True} for name in groups}
    disabled = {"equalization": {"enabled": False, "prob": 0.0}}
    entry = SIMCLR | enabled | disabled
    assert augmentation_from_config(entry) == augmentation_from_config(SIMCLR)


def test_absent_keys_do_nothing():
    a = augmentation_from_config({"crop_size": 32})
    assert (a.patch_size, a.scale, a.ratio, a.num_patches) == (None, (1, 1), (1, 1), 1)
    assert a == a.plain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"equalization": {"prob": 0.1}}, "equalization.prob to 0"),
        (
            {"crop": 3, "grayscale": {"p": 0.2}},
            r"unknown augmentation keys: crop, grayscale\.p; known are",
        ),
        ({"grayscale": 0.2}, "grayscale must be a mapping"),
        ({"patch_size": 16}, "patch_size 16 .*rrc.enabled"),
        ({"grayscale": {"enabled": False, "prob": 0.2}}, "is false.* set grayscale.prob to 0"),
        ({"num_crops": 0}, "num_patches"),
        ({"solarization": {"prob": 2}}, "solarize_prob"),
    ],
)
def test_refuses_entries(change, message):
    with pytest.raises(ValueError, match=message):
        augmentation_from_config(SIMCLR | change)


def test_refuses_what_is_not_an_entry():
    with pytest.raises(ValueError, match="mapping"):
        augmentation_from_config([SIMCLR])
