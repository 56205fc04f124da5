"""EMP-SSL for solo-learn. Importing this package puts ``"emp"`` into ``solo.methods.METHODS``."""
__version__ = "0.1.0"

from emp_plugin import solo_learn  # noqa: E402
from emp_plugin.methods import EMP  # noqa: E402

solo_learn.METHODS["emp"] = EMP
