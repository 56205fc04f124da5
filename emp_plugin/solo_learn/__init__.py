"""The only room that knows a solo-learn version.

Importing it imports solo-learn, makes the generation found work on today's torch and Lightning, and exports the names that the rest
of the project uses. Two generations are known: the wheel on the package index (1.0.2) and the repository's head (1.0.6).
"""

import importlib
from types import ModuleType

from torch import nn

from emp_plugin.solo_learn import counting
from emp_plugin.solo_learn.generation import find_generation

GENERATION, VERSION = find_generation()
if GENERATION == "wheel":
    import pytorch_lightning as pl

    from emp_plugin.solo_learn import wheel as patches
else:
    import lightning.pytorch as pl

    from emp_plugin.solo_learn import head as patches
patches.apply_patches(patches.import_solo())


def _solo(name: str) -> ModuleType:
    return importlib.import_module(f"solo.{name}")


METHODS = _solo("methods").METHODS
BaseMethod = _solo("methods.base").BaseMethod
BaseMomentumMethod = _solo("methods.base").BaseMomentumMethod
counting.apply_patches(METHODS["swav"], BaseMomentumMethod)
WeightedKNNClassifier = _solo("utils.knn").WeightedKNNClassifier

from emp_plugin.solo_learn.build import build_method, input_size, processes, split_settings  # noqa: E402  they need the names above


def backbone_of(method: nn.Module) -> nn.Module:
    """The backbone of a solo-learn method, whatever its generation calls it."""
    return method.encoder if GENERATION == "wheel" else method.backbone


__all__ = [
    "GENERATION",
    "METHODS",
    "VERSION",
    "BaseMethod",
    "BaseMomentumMethod",
    "WeightedKNNClassifier",
    "backbone_of",
    "build_method",
    "input_size",
    "patches",
    "pl",
    "processes",
    "split_settings",
]
