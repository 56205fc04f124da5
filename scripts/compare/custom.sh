#!/usr/bin/env bash
# Train and evaluate methods side by side; skips what is done. E.g.
# methods=[emp,byol] epochs=[1,10] seeds=[0,1,2] budget=minutes minutes=5
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_compare --config-path "$root/scripts/compare" --config-name custom "$@"
