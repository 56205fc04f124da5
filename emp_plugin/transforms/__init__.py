"""Patches: one augmentation (`PatchAugmentation`), a PIL pipeline (the reference) and a batched one for any device (for training)."""

from .augmentation import PatchAugmentation, augmentation_from_config
from .batch import BatchMultiPatch, PatchParameters
from .image import MultiPatchTransform

__all__ = [
    "BatchMultiPatch",
    "MultiPatchTransform",
    "PatchParameters",
    "PatchAugmentation",
    "augmentation_from_config",
]
