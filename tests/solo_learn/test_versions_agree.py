"""solo-learn 1.0.2 and 1.0.6 side by side, each in a process of its own."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emp_plugin.solo_learn import API
from support import ROOT

HERE = Path(__file__).parent


def checkout() -> Path | None:
    """Of solo-learn 1.0.6: the one in use, or the one that SOLO_LEARN names."""
    if API == "1.0.6":
        return Path(importlib.util.find_spec("solo").origin).parents[1].resolve()
    named = os.environ.get("SOLO_LEARN")
    return Path(named).resolve() if named else None


def has_1_0_2() -> bool:
    try:
        found = importlib.metadata.version("solo-learn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return found == "1.0.2" and importlib.util.find_spec("pytorch_lightning") is not None


def run(version: str, *arguments: object) -> None:
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in given if path and not (Path(path) / "solo").is_dir()]
    path = ([str(checkout())] if version == "1.0.6" else []) + [str(ROOT), *others]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "one_version.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    if not (has_1_0_2() and checkout()):
        pytest.skip("needs both versions: 1.0.2 installed, and SOLO_LEARN=<checkout of 1.0.6>")
    folders = {version: tmp_path_factory.mktemp(version) for version in ("1.0.2", "1.0.6")}
    run("1.0.2", "train", folders["1.0.2"])
    run("1.0.6", "train", folders["1.0.6"], folders["1.0.2"])
    run("1.0.6", "evaluate", folders["1.0.2"])
    run("1.0.2", "evaluate", folders["1.0.6"])
    return folders


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("emp", 1e-5), ("simclr-warmup", 1e-5), ("byol-sgd", 1e-5), ("simclr", 1e-9), ("byol", 1e-9)],
)
def test_losses_agree_over_20_steps(folders, name, tolerance):
    """In float32: EMP, SimCLR during its warm-up, and BYOL by SGD.

    SimCLR and BYOL by LARS at their full learning rate are in float64. The two LARS, and the two
    forms of SimCLR's loss, round differently, and these small networks make of 1e-7 more than 1e-5
    within ten steps (BYOL by LARS in its warm-up too).
    """
    old, new = (
        torch.load(folders[version] / f"{name}.results.pt")[0] for version in ("1.0.2", "1.0.6")
    )
    assert len(old) == 20
    assert max(old) - min(old) > 0.01
    assert new == pytest.approx(old, rel=tolerance)


@pytest.mark.parametrize("name", ["emp", "simclr", "byol", "vicreg", "ressl"])
@pytest.mark.parametrize("writer", ["1.0.2", "1.0.6"])
def test_a_checkpoint_evaluates_under_the_other(folders, name, writer):
    features = torch.load(folders[writer] / f"{name}.results.pt")[1]
    torch.testing.assert_close(torch.load(folders[writer] / f"{name}.elsewhere.pt"), features)
