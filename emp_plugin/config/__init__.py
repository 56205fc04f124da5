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
    command_line,
    read_config,
    trainer_arguments,
    uses_gpu,
)
from emp_plugin.config.models import Evaluation, Probe, Run

__all__ = [
    "TRAINER_KEYS",
    "Evaluation",
    "Probe",
    "Run",
    "augmentations",
    "backbone_kwargs",
    "check_config",
    "check_whole_images",
    "command_line",
    "input_size",
    "read_config",
    "trainer_arguments",
    "uses_gpu",
]
