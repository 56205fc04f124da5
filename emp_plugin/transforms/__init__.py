"""Patches: one recipe (`PatchRecipe`), a PIL pipeline (the reference) and a batched one for any device (for training)."""

from .batch import BatchMultiPatch, PatchParameters
from .image import MultiPatchTransform
from .recipe import PatchRecipe, recipe_from_augmentation

__all__ = [
    "BatchMultiPatch",
    "MultiPatchTransform",
    "PatchParameters",
    "PatchRecipe",
    "recipe_from_augmentation",
]
