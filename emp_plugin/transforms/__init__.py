"""Images to augmented patches: `PatchAugmentation` holds the settings of two pipelines.

`MultiPatchTransform` works on one PIL image and is the reference. `BatchMultiPatch` works on a
batch, on any device, and is used for training.
"""

from .augmentation import PatchAugmentation, augmentation_from_config
from .batch import BatchMultiPatch, PatchParameters
from .image import MultiPatchTransform

__all__ = [
    "BatchMultiPatch",
    "MultiPatchTransform",
    "PatchAugmentation",
    "PatchParameters",
    "augmentation_from_config",
]
