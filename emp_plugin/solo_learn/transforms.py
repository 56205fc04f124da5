"""solo-learn's own image transforms (PIL), for views made in DataLoader workers as it does."""

import importlib
from collections.abc import Callable

from omegaconf import OmegaConf

from emp_plugin.solo_learn import API

# what solo-learn's transforms do not let one set
FIXED = {
    "patch_size": None,
    "ratio": (3 / 4, 4 / 3),
    "interpolation": "bicubic",
    "blur_sigma": (0.1, 2.0),
}


def solo_transform(augmentation) -> Callable | None:
    """PIL image -> list of the augmentation's views, float (3, s, s), by solo-learn's transforms.

    None for an augmentation that they cannot make. ``augmentation`` has the attributes of
    :class:`emp_plugin.transforms.PatchAugmentation`.
    """
    if any(getattr(augmentation, name) != value for name, value in FIXED.items()):
        return None
    if API == "1.0.2":
        module = importlib.import_module("solo.utils.pretrain_dataloader")
        transform = module.CustomTransform(
            *augmentation.jitter,
            augmentation.jitter_prob,
            augmentation.grey_prob,
            augmentation.flip_prob,
            augmentation.blur_prob,
            augmentation.solarize_prob,
            *augmentation.scale,
            augmentation.output_size,
            augmentation.mean,
            augmentation.std,
        )
    else:
        module = importlib.import_module("solo.data.pretrain_dataloader")
        settings = OmegaConf.create(_settings_1_0_6(augmentation))
        transform = module.build_transform_pipeline("custom", settings)
    return module.NCropAugmentation(transform, augmentation.num_patches)


def _settings_1_0_6(augmentation) -> dict:
    brightness, contrast, saturation, hue = augmentation.jitter
    low, high = augmentation.scale
    return {
        "rrc": {"enabled": True, "crop_min_scale": low, "crop_max_scale": high},
        "crop_size": augmentation.output_size,
        "color_jitter": {
            "prob": augmentation.jitter_prob,
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
        },
        "grayscale": {"prob": augmentation.grey_prob},
        "gaussian_blur": {"prob": augmentation.blur_prob},
        "solarization": {"prob": augmentation.solarize_prob},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": augmentation.flip_prob},
        "mean": list(augmentation.mean),
        "std": list(augmentation.std),
    }
