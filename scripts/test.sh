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

absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
if absent:
    sys.exit(f"The tests need {' and '.join(absent)}: python -m pip install {' '.join(absent)}\n"
             "or leave this environment alone: EMP_ENV=venv bash scripts/test.sh")
import torch
from emp_plugin.solo_learn import GENERATION, VERSION, pl

print(f"Python {sys.version.split()[0]} ({sys.executable})")
print(f"torch {torch.__version__}, {pl.__name__} {pl.__version__}, solo-learn {VERSION} ({GENERATION})", flush=True)
EOP
exec python -m pytest "$@"
