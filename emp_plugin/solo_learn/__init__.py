"""All that depends on the version of solo-learn.

Importing this package imports solo-learn, repairs it, and exports the names that the rest of the
project uses. ``API`` is the version whose programming interface is installed: 1.0.2 (the package
index) or 1.0.6 (the repository). ``VERSION`` is what the installed one calls itself.

solo-learn's classes are repaired, so that they run on today's libraries. What changes numbers is in
classes of our own: :func:`corrected` gives the one of a method.
"""

import importlib

from torch import nn

from emp_plugin.solo_learn.version import find_api

API, VERSION = find_api()
if API == "1.0.2":
    import pytorch_lightning as pl

    from emp_plugin.solo_learn import v1_0_2 as installed
else:
    import lightning.pytorch as pl

    from emp_plugin.solo_learn import v1_0_6 as installed

_solo = installed.import_solo()
for _repair in installed.REPAIRS:
    _repair(_solo)

METHODS = importlib.import_module("solo.methods").METHODS
BaseMethod = _solo.base.BaseMethod
BaseMomentumMethod = _solo.base.BaseMomentumMethod

# these need the names above
from emp_plugin.solo_learn.build import build_method  # noqa: E402
from emp_plugin.solo_learn.corrections import Corrected, corrected  # noqa: E402
from emp_plugin.solo_learn.settings import processes, split_settings  # noqa: E402


def backbone_of(method: nn.Module) -> nn.Module:
    """The backbone of a solo-learn method, whatever its version calls it."""
    return method.encoder if API == "1.0.2" else method.backbone


def networks_of(method: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The networks of a method's training step, the online ones and the teacher's.

    Each list is in the order that an image goes through, and empty without a teacher. The parts
    are the backbone, EMP's embedding layer, the projector and the predictor, if they have weights.
    """
    names = "encoder" if API == "1.0.2" else "backbone", "embedder", "projector", "predictor"
    online, teacher = (
        [
            part
            for name in names
            if isinstance(part := getattr(method, prefix + name, None), nn.Module)
            and any(True for _ in part.parameters())
        ]
        for prefix in ("", "momentum_")
    )
    return online, teacher


__all__ = [
    "API",
    "METHODS",
    "VERSION",
    "BaseMethod",
    "BaseMomentumMethod",
    "Corrected",
    "backbone_of",
    "build_method",
    "corrected",
    "installed",
    "networks_of",
    "pl",
    "processes",
    "split_settings",
]

# whoever has imported solo-learn finds EMP in METHODS
importlib.import_module("emp_plugin.methods")
