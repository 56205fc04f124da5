"""Where images come from, and how a batch reaches the model."""
from emp_plugin.data.datasets import ImageData, load_dataset
from emp_plugin.data.pretrain import PretrainData, StepSampler, generator, make_views, normalise

__all__ = ["ImageData", "PretrainData", "StepSampler", "generator", "load_dataset", "make_views", "normalise"]
