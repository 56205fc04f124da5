"""Pretrain a method and evaluate it.

``python -m emp_plugin.main_pretrain --config-path DIR --config-name NAME [key=value ...]``
"""

import sys

from emp_plugin.command import user_command
from emp_plugin.config import command_line, read_config
from emp_plugin.training.run import pretrain


@user_command
def main(argv: list[str] | None = None) -> None:
    args, overrides = command_line(__doc__, argv)
    pretrain(read_config(args.config_path, args.config_name, overrides))


if __name__ == "__main__":
    sys.exit(main())
