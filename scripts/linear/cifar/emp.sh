#!/usr/bin/env bash
# bash scripts/linear/cifar/emp.sh pretrained_feature_extractor=CHECKPOINT [key=value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_linear --config-path "$root/scripts/linear/cifar" --config-name emp "$@"
