"""A run's configuration: read with Hydra, checked before anything starts."""

from emp_plugin.config.checks import (
    augmentations,
    backbone_kwargs,
    check_whole_images,
    input_size,
)
from emp_plugin.config.compose import (
    TRAINER_KEYS,
    check_config,
    from_dict,
    read_config,
    read_settings,
    to_dict,
    trainer_arguments,
    uses_gpu,
)
from emp_plugin.config.models import Probe, Run
from emp_plugin.config.recipes import annotated, recipe_names, recipes_root

__all__ = [
    "TRAINER_KEYS",
    "Probe",
    "Run",
    "annotated",
    "augmentations",
    "backbone_kwargs",
    "check_config",
    "check_whole_images",
    "from_dict",
    "input_size",
    "read_config",
    "read_settings",
    "recipe_names",
    "recipes_root",
    "to_dict",
    "trainer_arguments",
    "uses_gpu",
]
