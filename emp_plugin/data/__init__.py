"""Where images come from, and how a batch reaches the model."""

from emp_plugin.data.datasets import ImageData, load_dataset
from emp_plugin.data.files import ImageFiles
from emp_plugin.data.pretrain import (
    PretrainData,
    StepSampler,
    generator,
    in_order,
    make_views,
    normalise,
)

__all__ = [
    "ImageData",
    "ImageFiles",
    "PretrainData",
    "StepSampler",
    "generator",
    "in_order",
    "load_dataset",
    "make_views",
    "normalise",
]
