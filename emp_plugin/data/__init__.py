"""Where images come from, and how a batch reaches the model."""

from emp_plugin.data.batches import StepSampler, generator, in_order, make_views, normalise
from emp_plugin.data.datasets import ImageData, load_dataset
from emp_plugin.data.files import ImageFiles

__all__ = [
    "ImageData",
    "ImageFiles",
    "StepSampler",
    "generator",
    "in_order",
    "load_dataset",
    "make_views",
    "normalise",
]
