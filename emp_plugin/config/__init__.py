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
    from_dict,
    read_config,
    read_yaml,
    to_dict,
    trainer_arguments,
    uses_gpu,
)
from emp_plugin.config.models import Probe, Run

__all__ = [
    "TRAINER_KEYS",
    "Probe",
    "Run",
    "augmentations",
    "backbone_kwargs",
    "check_config",
    "check_whole_images",
    "command_line",
    "from_dict",
    "input_size",
    "read_config",
    "read_yaml",
    "to_dict",
    "trainer_arguments",
    "uses_gpu",
]
