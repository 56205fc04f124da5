"""Probe checkpoints on both CIFARs.

``python -m emp_plugin.main_transfer --config-path DIR --config-name NAME CHECKPOINT ...``

Then come settings, ``key=value``. DIR, NAME and keys are those of ``main_linear``;
``results_dir=DIR`` is where the table goes.
"""

import sys
from pathlib import Path

from emp_plugin.command import user_command
from emp_plugin.config import command_line
from emp_plugin.studies.transfer import transfer


@user_command
def main(argv: list[str] | None = None) -> None:
    args, items = command_line(__doc__, argv)
    results, checkpoints, overrides = "results/transfer-cifar", [], []
    for item in items:
        key, _, value = item.partition("=")
        if key == "results_dir":
            results = value
        elif key != "pretrained_feature_extractor" and item.endswith(".ckpt"):
            checkpoints.append(item)
        else:
            overrides.append(item)
    checkpoints = list(dict.fromkeys(checkpoints))  # each once
    results_dir = Path(results).expanduser()
    transfer(checkpoints, results_dir, args.config_path, args.config_name, overrides)


if __name__ == "__main__":
    sys.exit(main())
