#!/usr/bin/env bash
# Pretrain and evaluate; settings are overridden as key=value, e.g. max_epochs=10
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$root/scripts/env.sh"
exec python -m emp_plugin.main_pretrain --config-path "$root/scripts/pretrain" --config-name cifar/emp_crop_grey "$@"
