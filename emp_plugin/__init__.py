"""EMP-SSL for solo-learn. Importing this package puts ``"emp"`` into ``solo.methods.METHODS``."""

from typing import Any

__version__ = "0.1.0"

from emp_plugin import solo_learn  # noqa: E402
from emp_plugin.methods import EMP  # noqa: E402

solo_learn.METHODS["emp"] = EMP


def __getattr__(name: str) -> Any:
    if name in ("load_backbone", "load_method"):  # on demand, as few need them
        from emp_plugin import export

        return getattr(export, name)
    raise AttributeError(f"module 'emp_plugin' has no attribute '{name}'")
