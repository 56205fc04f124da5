#!/usr/bin/env bash
# bash scripts/transfer/cifar.sh CHECKPOINT [CHECKPOINT ...] [results_dir=DIR] [key=value ...]
# Probes checkpoints, of any method, on CIFAR-10 and on CIFAR-100.
# In folders of their own: 'data.train_path=DIR/${data.dataset}'
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_transfer --config-path "$root/scripts/linear/cifar" --config-name emp "$@"
