import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest

from emp_plugin.solo_learn import (
    API,
    VERSION,
    installed,
    version,
)
from support import ROOT

only_1_0_2 = pytest.mark.skipif(API != "1.0.2", reason="about solo-learn 1.0.2")


def test_what_is_in_use_is_recognised():
    assert (API, VERSION) in {("1.0.2", "1.0.2"), ("1.0.6", "1.0.6")}


def test_a_checkout_tells_its_version(tmp_path):
    """It has no metadata of its own; that of another one, installed, says nothing about it."""
    (tmp_path / "solo").mkdir()
    assert version._version(tmp_path / "solo") == "unknown"
    (tmp_path / "setup.py").write_text('setup(name="solo-learn", version="1.0.7")')
    assert version._version(tmp_path / "solo") == "1.0.7"


@pytest.mark.parametrize(
    ("files", "number", "expected"),
    [
        (["utils/backbones.py"], "1.0.2", "1.0.2"),
        (["utils/backbones.py"], "unknown", "1.0.2"),
        (["utils/backbones.py"], "1.0.1", None),
        (["backbones/__init__.py", "methods/mae.py"], "1.0.6", "1.0.6"),
        ([], "unknown", None),  # some folder called solo
    ],
)
def test_the_api_is_judged_by_layout(tmp_path, files, number, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert version.api_of(tmp_path, number) == expected


def test_absent_or_unknown_solo_names_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps solo-learn==1.0.2.*git"):
        version.find_api()
    spec = importlib.machinery.ModuleSpec("solo", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    message = "does not know solo-learn unknown.*pip install --no-deps solo-learn==1.0.2"
    with pytest.raises(ImportError, match=message):
        version.find_api()


def test_no_stand_in_stays_visible():
    assert not [name for name in sys.modules if name.split(".")[0] == "pl_bolts"]
    assert importlib.util.find_spec("pl_bolts") is None


@only_1_0_2
def test_import_works_without_distutils_and_with_a_broken_pl_bolts(tmp_path):
    """Python 3.12 has no distutils; pl_bolts raises AttributeErrors on Lightning 2."""
    broken = tmp_path / "pl_bolts"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise AttributeError('lightning is too new')")
    code = """
import sys
class NoDistutils:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "distutils": raise ModuleNotFoundError(name)
for name in [n for n in sys.modules if n.split(".")[0] == "distutils"]: del sys.modules[name]
sys.meta_path.insert(0, NoDistutils())
try:
    import solo
    sys.exit("solo-learn imports by itself: the stand-ins are not needed")
except (ImportError, AttributeError):
    pass
from emp_plugin.solo_learn import METHODS
from argparse import ArgumentParser
parser = METHODS["dino"].add_model_specific_args(ArgumentParser())
arguments = parser.parse_args(["--optimizer", "sgd", "--norm_last_layer", "no"])
assert arguments.norm_last_layer == 0
assert not {"distutils", "pl_bolts"} & set(sys.modules), "stand-ins left behind"
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@only_1_0_2
def test_a_working_pl_bolts_is_used(tmp_path, monkeypatch):
    package = tmp_path / "pl_bolts" / "optimizers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "lr_scheduler.py").write_text("class LinearWarmupCosineAnnealingLR: pass")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert installed._pl_bolts_stand_in() == {}
    finally:
        for name in installed.PL_BOLTS:
            sys.modules.pop(name, None)


def test_our_tests_are_no_package():
    """1.0.2 installs a package ``tests``: the first of two on sys.path would hide the other."""
    assert not (ROOT / "tests" / "__init__.py").exists()
