"""What several tests share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def run_python(code: str, *arguments: object, path: tuple = ()) -> subprocess.CompletedProcess:
    """Run code in a Python of its own, which finds modules in ``path`` first."""
    places = [*path, ROOT, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done
