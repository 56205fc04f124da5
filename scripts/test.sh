#!/usr/bin/env bash
# Runs the tests; arguments go to pytest:
#
#     bash scripts/test.sh                          all but the slow ones
#     bash scripts/test.sh -m ""                    all
#     bash scripts/test.sh tests/test_losses.py -k rate
#     SOLO_LEARN=<checkout> bash scripts/test.sh    with this solo-learn, 1.0.6; where 1.0.2 is
#                                                   installed too, also compares the two
set -euo pipefail
if [ -n "${SOLO_LEARN:-}" ]; then
    if [ ! -d "$SOLO_LEARN/solo" ]; then
        echo "SOLO_LEARN=$SOLO_LEARN is no checkout of solo-learn: it has no folder solo" >&2
        exit 1
    fi
    SOLO_LEARN=$(cd "$SOLO_LEARN" && pwd)
    export SOLO_LEARN PYTHONPATH="$SOLO_LEARN${PYTHONPATH:+:$PYTHONPATH}"
fi
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# .venv starts from an empty one
[ -z "${SOLO_LEARN:-}" ] || export PYTHONPATH="$SOLO_LEARN:$PYTHONPATH"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python - <<'EOP'
import importlib.util
import sys

absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
if absent:
    sys.exit(f"The tests need {' and '.join(absent)}: python -m pip install {' '.join(absent)}\n"
             "or leave this environment alone: EMP_ENV=venv bash scripts/test.sh")
import torch
from emp_plugin.solo_learn import API, VERSION, pl

print(f"Python {sys.version.split()[0]} ({sys.executable})")
where = importlib.util.find_spec("solo").submodule_search_locations[0]
print(f"torch {torch.__version__}, {pl.__name__} {pl.__version__}, solo-learn {VERSION} ({API}, {where})", flush=True)
EOP
exec python -m pytest "$@"
