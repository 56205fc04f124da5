"""All that depends on the version of solo-learn.

Importing this package imports solo-learn, repairs it for today's torch and Lightning, and exports the
names that the rest of the project uses. ``API`` is the version whose programming interface is
installed: 1.0.2 (the package index) or 1.0.6 (the repository). ``VERSION`` is what the installed
one calls itself.
"""

import importlib
from types import ModuleType

from torch import nn

from emp_plugin.solo_learn import corrections
from emp_plugin.solo_learn.version import find_api

API, VERSION = find_api()
if API == "1.0.2":
    import pytorch_lightning as pl

    from emp_plugin.solo_learn import v1_0_2 as installed
else:
    import lightning.pytorch as pl

    from emp_plugin.solo_learn import v1_0_6 as installed
installed.apply_repairs(installed.import_solo())


def _solo(name: str) -> ModuleType:
    return importlib.import_module(f"solo.{name}")


METHODS = _solo("methods").METHODS
BaseMethod = _solo("methods.base").BaseMethod
BaseMomentumMethod = _solo("methods.base").BaseMomentumMethod
corrections.apply_corrections(METHODS["swav"], BaseMomentumMethod)
WeightedKNNClassifier = _solo("utils.knn").WeightedKNNClassifier

# these need the names above
from emp_plugin.solo_learn.build import build_method, processes, split_settings  # noqa: E402


def backbone_of(method: nn.Module) -> nn.Module:
    """The backbone of a solo-learn method, whatever its version calls it."""
    return method.encoder if API == "1.0.2" else method.backbone


__all__ = [
    "API",
    "METHODS",
    "VERSION",
    "BaseMethod",
    "BaseMomentumMethod",
    "WeightedKNNClassifier",
    "backbone_of",
    "build_method",
    "installed",
    "pl",
    "processes",
    "split_settings",
]
