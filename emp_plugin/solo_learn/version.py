"""Which solo-learn is installed, found without importing it."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from emp_plugin.errors import UserError

INSTALL = (
    "install the tested version with `pip install --no-deps solo-learn==1.0.2` "
    "(or 1.0.6 with `pip install --no-deps git+https://github.com/vturrisi/solo-learn`)"
)


class SoloMissing(UserError, ImportError):
    """There is no solo-learn, or none that we know."""


def find_api() -> tuple[str, str]:
    """API ("1.0.2" or "1.0.6") and version of the solo-learn that ``import solo`` would find.

    Raises:
        SoloMissing: there is no solo-learn, or an unknown one; the message says how to install it.
    """
    spec = importlib.util.find_spec("solo")
    if spec is None:
        raise SoloMissing(
            f"emp_plugin is a plugin of solo-learn, which is not installed; {INSTALL}"
        )
    root = Path(next(iter(spec.submodule_search_locations or ["."])))
    version = _version(root)
    api = api_of(root, version)
    if api is None:
        raise SoloMissing(f"emp_plugin does not know solo-learn {version} in {root}; {INSTALL}")
    return api, version


def api_of(root: Path, version: str) -> str | None:
    """The API of the package in folder ``root``, None if unknown.

    Judged by its files. Those of 1.0.2 are older than it, so that the version has to match too.
    """
    if (root / "backbones").is_dir() and (root / "methods" / "mae.py").is_file():
        return "1.0.6"
    if (root / "utils" / "backbones.py").is_file() and version in ("1.0.2", "unknown"):
        return "1.0.2"
    return None


def _version(root: Path) -> str:
    """Version of the distribution that ``root`` belongs to; of a checkout, its setup.py's."""
    try:
        found = importlib.metadata.distribution("solo-learn")
        installed = Path(str(found.locate_file("solo"))).resolve()
        editable = found.read_text("direct_url.json") or ""
        if installed == root.resolve() or str(root.resolve().parent) in editable:
            return found.version
    except importlib.metadata.PackageNotFoundError:
        pass
    setup = root.parent / "setup.py"
    written = re.search(r"""version=["']([^"']+)""", setup.read_text()) if setup.is_file() else None
    return written[1] if written else "unknown"
