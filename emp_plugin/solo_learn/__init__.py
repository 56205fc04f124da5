"""All that depends on the version of solo-learn.

Importing this package imports solo-learn, repairs and corrects it, and exports the names that the
rest of the project uses. ``API`` is the version whose programming interface is installed: 1.0.2
(the package index) or 1.0.6 (the repository). ``VERSION`` is what the installed one calls itself.
"""

import importlib

from torch import nn

from emp_plugin.solo_learn import corrections, repairs
from emp_plugin.solo_learn.version import find_api

API, VERSION = find_api()
if API == "1.0.2":
    import pytorch_lightning as pl

    from emp_plugin.solo_learn import v1_0_2 as installed
else:
    import lightning.pytorch as pl

    from emp_plugin.solo_learn import v1_0_6 as installed

_solo = installed.import_solo()
repairs.apply_repairs(_solo, installed.REPAIRS, API)
corrections.apply_corrections(_solo, API)

METHODS = importlib.import_module("solo.methods").METHODS
BaseMethod = _solo.base.BaseMethod
BaseMomentumMethod = _solo.base.BaseMomentumMethod
WeightedKNNClassifier = _solo.knn.WeightedKNNClassifier

# these need the names above
from emp_plugin.solo_learn.build import build_method  # noqa: E402
from emp_plugin.solo_learn.settings import processes, split_settings  # noqa: E402


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
