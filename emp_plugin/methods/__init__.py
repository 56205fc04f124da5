"""Methods of this project, one file each."""

from emp_plugin.methods.emp import EMP, EMPSettings
from emp_plugin.solo_learn import METHODS

METHODS["emp"] = EMP

__all__ = ["EMP", "EMPSettings"]
