"""A checkpoint's backbone as safetensors: ``python -m emp_plugin.main_export CHECKPOINT [OUT]``."""

import argparse
import sys
from pathlib import Path

from emp_plugin.command import user_command
from emp_plugin.export import export_backbone


@user_command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "out", type=Path, nargs="?", help="default: backbone.safetensors beside the checkpoint"
    )
    args = parser.parse_args(argv)
    out = args.out or args.checkpoint.with_name("backbone.safetensors")
    print(f"results: {export_backbone(args.checkpoint, out)}")


if __name__ == "__main__":
    sys.exit(main())
