"""solo-learn's own image transforms (PIL), for views made in DataLoader workers as solo-learn makes them."""

import importlib
from collections.abc import Callable

from omegaconf import OmegaConf

from emp_plugin.solo_learn import API

CAN = {
    "patch_size": None,
    "ratio": (3 / 4, 4 / 3),
    "interpolation": "bicubic",
    "blur_sigma": (0.1, 2.0),
}  # the rest is settings


def solo_transform(augmentation) -> Callable | None:
    """PIL image -> list of the augmentation's views, float (3, s, s), by solo-learn's transforms; None for a augmentation that they cannot make.

    ``augmentation`` has the attributes of :class:`emp_plugin.transforms.PatchAugmentation`.
    """
    if any(getattr(augmentation, name) != value for name, value in CAN.items()):
        return None
    module = importlib.import_module(
        "solo.utils.pretrain_dataloader" if API == "1.0.2" else "solo.data.pretrain_dataloader"
    )
    brightness, contrast, saturation, hue = augmentation.jitter
    low, high = augmentation.scale
    if API == "1.0.2":
        transform = module.CustomTransform(
            brightness,
            contrast,
            saturation,
            hue,
            augmentation.jitter_prob,
            augmentation.grey_prob,
            augmentation.flip_prob,
            augmentation.blur_prob,
            augmentation.solarize_prob,
            low,
            high,
            augmentation.output_size,
            augmentation.mean,
            augmentation.std,
        )
    else:
        transform = module.build_transform_pipeline(
            "custom",
            OmegaConf.create(
                {
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
            ),
        )
    return module.NCropAugmentation(transform, augmentation.num_patches)
