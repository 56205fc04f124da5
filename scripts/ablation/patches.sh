#!/usr/bin/env bash
# Accuracy against patches per step, after equal epochs and after equal minutes.
# What is done is skipped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_compare --config-path "$root/scripts/ablation" --config-name cifar10 \
    ablate=data.num_patches "values=[2,5,10,20]" "budget=[epochs,minutes]" "$@"
