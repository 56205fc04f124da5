"""A package imports only those above it."""

import ast
from pathlib import Path

import pytest

import emp_plugin

PACKAGE = Path(emp_plugin.__file__).parent
ORDER = (
    "errors",
    "losses",
    "heads",
    "transforms",
    "data",
    "evaluation",
    "config",
    "solo_learn",
    "methods",
    "training",
    "export",
    "studies",
    "cli",
)


def imported(path):
    """Modules of this project that a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_dictconfig_stays_where_settings_are_read():
    """And in solo_learn, whose 1.0.6 takes one."""
    rooms = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "omegaconf" for name in imported(path))
    }
    assert rooms == {"config", "solo_learn"}


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_above_it(package):
    folder = PACKAGE / package
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    below = set(ORDER[ORDER.index(package) + 1 :])
    for path in files:
        parts = [name.split(".") for name in imported(path) if name.startswith("emp_plugin.")]
        assert not below & {part[1] for part in parts}, path


def test_every_package_has_its_place():
    rooms = [path for path in PACKAGE.iterdir() if path.suffix in ("", ".py")]
    names = {path.stem for path in rooms if not path.stem.startswith("__")}
    assert names == set(ORDER)
