"""The rooms that others use by themselves are light to import."""

import subprocess
import sys

import pytest

from support import ROOT

HEAVY = {
    "hydra",
    "lightning",
    "matplotlib",
    "omegaconf",
    "pandas",
    "pytorch_lightning",
    "rich",
    "scipy",
    "sklearn",
    "solo",
    "timm",
    "torchmetrics",
}
CODE = "import sys, emp_plugin.{room}; print(*sys.modules)"


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("losses", ["torchvision"]),
        ("heads", ["torchvision"]),
        ("transforms", []),
        ("data", []),
        ("evaluation", []),
    ],
)
def test_a_room_imports_nothing_heavy(room, others):
    command = [sys.executable, "-c", CODE.format(room=room)]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"emp_plugin.{room}" in loaded.split()
    assert not HEAVY.union(others) & {name.partition(".")[0] for name in loaded.split()}
