"""Probe checkpoints on both CIFARs: ``python -m emp_plugin.main_transfer --config-path DIR --config-name NAME RUN/last.ckpt ... [key=value ...]``.

DIR, NAME and keys are those of ``main_linear``; ``results_dir=DIR`` is where the table goes.
"""

import sys
from pathlib import Path

from emp_plugin.command import user_command
from emp_plugin.config import command_line
from emp_plugin.studies.transfer import transfer


@user_command
def main(argv: list[str] | None = None) -> None:
    args, items = command_line(__doc__, argv)
    results = [item.partition("=")[2] for item in items if item.startswith("results_dir=")] or [
        "results/transfer-cifar"
    ]
    checkpoints = list(
        dict.fromkeys(
            item
            for item in items
            if item.endswith(".ckpt") and not item.startswith("pretrained_feature_extractor=")
        )
    )
    overrides = [
        item for item in items if item not in checkpoints and not item.startswith("results_dir=")
    ]
    transfer(
        checkpoints, Path(results[-1]).expanduser(), args.config_path, args.config_name, overrides
    )


if __name__ == "__main__":
    sys.exit(main())
