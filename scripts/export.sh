#!/usr/bin/env bash
# bash scripts/export.sh CHECKPOINT [OUT.safetensors]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_export "$@"
