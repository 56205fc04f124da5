#!/usr/bin/env bash
# Accuracy against batch size; what is done is skipped. Any other number as well:
# ablate=method_kwargs.invariance_weight "values=[50,100,200,400]"
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_compare --config-path "$root/scripts/ablation" --config-name cifar10 \
    ablate=optimizer.batch_size "values=[50,100,200]" "$@"
