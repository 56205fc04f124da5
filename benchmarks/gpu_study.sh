#!/usr/bin/env bash
# The study that waits for a GPU; see gpu_study.py
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"
exec python "$root/benchmarks/gpu_study.py" "$@"
