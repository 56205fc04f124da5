"""solo-learn's own image transforms (PIL), for views made in DataLoader workers as solo-learn makes them."""

import importlib
from collections.abc import Callable

from omegaconf import OmegaConf

from emp_plugin.solo_learn import GENERATION

CAN = {
    "patch_size": None,
    "ratio": (3 / 4, 4 / 3),
    "interpolation": "bicubic",
    "blur_sigma": (0.1, 2.0),
}  # the rest is settings


def solo_transform(recipe) -> Callable | None:
    """PIL image -> list of the recipe's views, float (3, s, s), by solo-learn's transforms; None for a recipe that they cannot make.

    ``recipe`` has the attributes of :class:`emp_plugin.transforms.PatchRecipe`.
    """
    if any(getattr(recipe, name) != value for name, value in CAN.items()):
        return None
    module = importlib.import_module(
        "solo.utils.pretrain_dataloader"
        if GENERATION == "wheel"
        else "solo.data.pretrain_dataloader"
    )
    brightness, contrast, saturation, hue = recipe.jitter
    low, high = recipe.scale
    if GENERATION == "wheel":
        transform = module.CustomTransform(
            brightness,
            contrast,
            saturation,
            hue,
            recipe.jitter_prob,
            recipe.grey_prob,
            recipe.flip_prob,
            recipe.blur_prob,
            recipe.solarize_prob,
            low,
            high,
            recipe.output_size,
            recipe.mean,
            recipe.std,
        )
    else:
        transform = module.build_transform_pipeline(
            "custom",
            OmegaConf.create(
                {
                    "rrc": {"enabled": True, "crop_min_scale": low, "crop_max_scale": high},
                    "crop_size": recipe.output_size,
                    "color_jitter": {
                        "prob": recipe.jitter_prob,
                        "brightness": brightness,
                        "contrast": contrast,
                        "saturation": saturation,
                        "hue": hue,
                    },
                    "grayscale": {"prob": recipe.grey_prob},
                    "gaussian_blur": {"prob": recipe.blur_prob},
                    "solarization": {"prob": recipe.solarize_prob},
                    "equalization": {"prob": 0.0},
                    "horizontal_flip": {"prob": recipe.flip_prob},
                    "mean": list(recipe.mean),
                    "std": list(recipe.std),
                }
            ),
        )
    return module.NCropAugmentation(transform, recipe.num_patches)
