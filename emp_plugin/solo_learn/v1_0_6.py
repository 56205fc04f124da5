"""solo-learn 1.0.6: it needs the repairs of :mod:`repairs` alone."""

import warnings
from types import SimpleNamespace

from emp_plugin.solo_learn.repairs import REPAIRS, import_modules

__all__ = ["REPAIRS", "import_solo"]


def import_solo() -> SimpleNamespace:
    """Import solo-learn; the modules of :func:`repairs.import_modules`."""
    with warnings.catch_warnings():
        # about APIs and names that solo-learn uses; its user cannot change them
        warnings.simplefilter("ignore")
        return import_modules()
