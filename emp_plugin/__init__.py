"""EMP-SSL for solo-learn. Importing this package puts ``"emp"`` into ``solo.methods.METHODS``."""
from emp_plugin import solo_learn
from emp_plugin.methods import EMP

__version__ = "0.1.0"

solo_learn.METHODS["emp"] = EMP
