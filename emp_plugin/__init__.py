"""EMP-SSL for solo-learn.

Importing this package imports no other. When ``solo`` is first imported, by anybody, it is repaired
(:mod:`emp_plugin.solo_learn.repairs`) and gets ``solo.methods.METHODS["emp"]``; at once if it
already is.
"""

import importlib
import sys
import warnings
from copy import copy
from functools import partial
from typing import Any

__version__ = "0.1.0"

ON_DEMAND = {
    "EMP": "emp_plugin.methods",
    "load_backbone": "emp_plugin.export",
    "load_method": "emp_plugin.export",
}


__all__ = [*ON_DEMAND]


def __getattr__(name: str) -> Any:
    if name in ON_DEMAND:
        return getattr(importlib.import_module(ON_DEMAND[name]), name)
    raise AttributeError(f"module 'emp_plugin' has no attribute '{name}'")


class _SoloFinder:
    """Finds ``solo`` where the other finders do, and has it repaired while it is imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name != "solo":
            return None
        # not by identity: this module may have been imported twice
        others = (f for f in sys.meta_path if getattr(f, "__name__", "") != _SoloFinder.__name__)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec and spec.loader:
            spec.loader = copy(spec.loader)
            run = partial(_run_solo, spec.loader.exec_module)
            spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


def _run_solo(run: Any, module: Any) -> None:
    _repair_solo()  # imports its modules: those of 1.0.2 do not import by themselves any more
    run(module)


def _repair_solo() -> None:
    try:
        importlib.import_module("emp_plugin.solo_learn")
    except ImportError as error:
        warnings.warn(f"solo-learn is left as it is, without EMP: {error}", stacklevel=2)


sys.meta_path.insert(0, _SoloFinder)
if "solo" in sys.modules:
    _repair_solo()
