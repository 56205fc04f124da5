#!/usr/bin/env bash
# bash scripts/visualize/tsne.sh CHECKPOINT [CHECKPOINT ...] [--features projection] [--out FILES]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_tsne "$@"
