"""Methods of this project, one file each."""

from emp_plugin.methods.emp import EMP, EMPSettings

__all__ = ["EMP", "EMPSettings"]
