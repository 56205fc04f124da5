"""The PIL pipeline and the batched one agree in distribution.

The images are real: scikit-learn's digits, tinted.
"""

import dataclasses
import random

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from sklearn.datasets import load_digits

from emp_plugin.config import augmentations
from emp_plugin.training.data import image_transform
from emp_plugin.transforms import (
    BatchMultiPatch,
    MultiPatchTransform,
    PatchAugmentation,
    augmentation_from_config,
)

SOLO = augmentation_from_config(
    {
        "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0},
        "color_jitter": dict(prob=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
        "grayscale": {"prob": 0.2},
        "gaussian_blur": {"prob": 0.5},
        "solarization": {"prob": 0.2},
        "horizontal_flip": {"prob": 0.5},
        "crop_size": 32,
        "num_crops": 40,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }
)


@pytest.fixture(scope="module")
def digits():
    """(60, 3, 32, 32) uint8: digits in one random colour on another."""
    grey = torch.tensor(load_digits().images[:60] / 16)[:, None].float()
    grey = torch.nn.functional.interpolate(grey, (32, 32), mode="bilinear").clamp(0, 1)
    ink, paper = torch.rand(2, 60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return ((ink * grey + paper * (1 - grey)) * 255).round().to(torch.uint8)


def pil_images(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def both(augmentation, images, transform=None):
    """(PIL patches, batched patches), each (n * b, 3, s, s), back in [0, 1]."""
    torch.manual_seed(0)
    random.seed(0)
    transform = transform or MultiPatchTransform.from_augmentation(augmentation)
    theirs = torch.cat([torch.stack(transform(image)) for image in pil_images(images)])
    batched = BatchMultiPatch.from_augmentation(augmentation)
    ours = batched(images, torch.Generator().manual_seed(0)).flatten(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augmentation.mean, augmentation.std))
    return theirs * std + mean, ours * std + mean


def statistics(patches):
    """Pairs (name, one number per patch): channel moments, colour, sharpness, left-right slope."""
    yield from (("mean", x) for x in patches.mean((-1, -2)).T)
    yield from (("std", x) for x in patches.std((-1, -2)).T)
    yield "colour", (patches.amax(1) - patches.amin(1)).mean((-1, -2))
    yield "sharpness", patches.diff(dim=-1).abs().mean((1, 2, 3))
    half = patches.shape[-1] // 2
    yield "slope", (patches[..., half:] - patches[..., :half]).mean((1, 2, 3))


@pytest.mark.parametrize(
    "augmentation",
    [PatchAugmentation(40, 16, 16), PatchAugmentation(40, 16, 32), SOLO],
    ids=["16", "16-32", "solo"],
)
def test_same_distribution(augmentation, digits):
    check_same_distribution(augmentation, *both(augmentation, digits))


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("cifar/simclr", 0),
        ("cifar/swav", 0),
        ("cifar/vicreg", 0),
        ("cifar/byol", 0),
        ("cifar/byol", 1),
        ("cifar/ressl", 0),
        ("cifar/ressl", 1),
        ("digits/simclr", 0),
        ("digits/swav", 0),
        ("digits/vicreg", 0),
        ("digits/byol", 0),
        ("digits/ressl", 0),
        ("digits/ressl", 1),
    ],
)
def test_baselines_views_are_distributed_as_solo_learns_own(config, digits, name, view):
    """The transforms of ``data.views=image`` are solo-learn's, random-resized crops included."""
    augmentation = augmentations(config(name))[view].with_patches(40)
    transform = image_transform(augmentation)
    assert type(transform).__module__.startswith("solo.")
    check_same_distribution(augmentation, *both(augmentation, digits, transform))


def check_same_distribution(augmentation, theirs, ours):
    # 2,400 patches each: a Kolmogorov-Smirnov distance of 0.056 has probability 0.001. 8-bit PIL
    # rounds down in every operation, which moves means by up to two levels.
    for (name, a), (_, b) in zip(statistics(theirs), statistics(ours)):
        # rounded, or float noise around 0 would count (colour of grey patches)
        a, b = (x.numpy().round(3) for x in (a, b))
        assert scipy.stats.ks_2samp(a, b).statistic < 0.056, name
    # Patches are often of one colour, so a share of an eighth has a standard error of 0.7 % in each
    # sample.
    for channel in range(3):
        a, b = (histogram(patches[:, channel]) for patches in (theirs, ours))
        assert np.abs(a - b).max() < 0.03
    for patches in (theirs, ours):
        is_grey = (patches.amax(1) - patches.amin(1)).amax((1, 2)) < 1e-4
        assert happens_with(augmentation.grey_prob, is_grey)


def histogram(values):
    """Shares of eight bins of [0, 1]."""
    return np.histogram(values.numpy(), bins=8, range=(-0.001, 1.001))[0] / values.numel()


def happens_with(probability, happened):
    """Whether so many happening is likely enough for this probability (binomial test)."""
    return scipy.stats.binomtest(int(happened.sum()), len(happened), probability).pvalue > 1e-3


def only(augmentation, **settings):
    """The plain augmentation with these settings."""
    return dataclasses.replace(augmentation.plain(), **settings)


@pytest.mark.parametrize(
    "name", ["flip_prob", "jitter_prob", "grey_prob", "blur_prob", "solarize_prob"]
)
def test_share_of_each_operation(name):
    """With one operation at 30 % and the others off, 30 % of the patches differ from the image."""
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16)).astype(np.uint8)
    image = torch.from_numpy(image).clamp(30, 250)
    strengths = dict(jitter=(0.4, 0.4, 0.4, 0.2), blur_sigma=(0.8, 2.0))
    augmentation = only(PatchAugmentation(600, 16, 16), **strengths, **{name: 0.3})
    for patches in both(augmentation, image):
        changed = ((patches - image / 255).abs() > 0.004).flatten(1).any(1)
        assert happens_with(0.3, changed)


@pytest.mark.parametrize(
    ("patch_size", "output_size", "interpolation"),
    [(16, 16, "bilinear"), (16, 32, "bilinear"), (32, 20, "bicubic")],
)
def test_plain_patches_are_equal_to_rounding(digits, patch_size, output_size, interpolation):
    """Of the same boxes the pipelines differ by PIL's rounding to 8 bits, once per axis."""
    images = digits[:, :, :patch_size, :patch_size]
    augmentation = PatchAugmentation(1, patch_size, output_size, interpolation=interpolation)
    theirs, ours = both(augmentation.plain(), images)
    assert (theirs - ours).abs().max() < 1.3 / 255


def test_solarize_alone_is_equal(digits):
    augmentation = only(PatchAugmentation(1, 32, 32), solarize_prob=1.0)
    theirs, ours = both(augmentation, digits)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_blur_is_close_to_pils():
    """Inside the patch only: PIL stacks three box blurs, and repeats the border."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    for sigma in (0.5, 1.0, 2.0):
        augmentation = only(PatchAugmentation(1, 32, 32), blur_prob=1.0, blur_sigma=(sigma, sigma))
        theirs, ours = both(augmentation, image)
        assert (theirs - ours)[..., 8:-8, 8:-8].abs().mean() < 0.02


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_image_modes(mode):
    image = Image.new("RGB", (40, 30), (200, 30, 90)).convert(mode)
    patches = MultiPatchTransform(3, 16, 20)(image)
    assert isinstance(patches, list)
    assert len(patches) == 3
    assert all(patch.shape == (3, 20, 20) and patch.dtype == torch.float32 for patch in patches)


def test_image_smaller_than_the_patch():
    message = "height x width = 10 x 40; use a patch_size of at most 10"
    with pytest.raises(ValueError, match=message):
        MultiPatchTransform(3, 16, 20)(Image.new("RGB", (40, 10)))
