#!/usr/bin/env bash
# Runs the tests; arguments go to pytest:
#
#     bash scripts/test.sh                          all but the slow ones
#     bash scripts/test.sh -m ""                    all
#     bash scripts/test.sh tests/test_losses.py -k rate
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python - <<'EOP'
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def of(name):
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} (none)"


solo = Path(importlib.util.find_spec("solo").origin).parent
generation = "repository head" if (solo / "backbones").is_dir() else "wheel generation"
installed = solo.parent.glob("solo_learn-*.dist-info")
release = next((path.name.split("-")[1].removesuffix(".dist") for path in installed), f"checkout {solo.parent}")
print(f"Python {sys.version.split()[0]} ({sys.executable})")
print(f"{of('torch')}, {of('lightning')}, solo-learn {release} ({generation})", flush=True)
absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
if absent:
    sys.exit(f"The tests need {' and '.join(absent)}: python -m pip install {' '.join(absent)}\n"
             "or leave this environment alone: EMP_ENV=venv bash scripts/test.sh")
EOP
exec python -m pytest "$@"
