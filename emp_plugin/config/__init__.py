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
    read_config,
    trainer_arguments,
    uses_gpu,
)
from emp_plugin.config.models import Evaluation, Probe, Run
from emp_plugin.config.recipes import annotated, recipe_names, recipes_root

__all__ = [
    "TRAINER_KEYS",
    "Evaluation",
    "Probe",
    "Run",
    "annotated",
    "augmentations",
    "backbone_kwargs",
    "check_config",
    "check_whole_images",
    "input_size",
    "read_config",
    "recipe_names",
    "recipes_root",
    "trainer_arguments",
    "uses_gpu",
]
