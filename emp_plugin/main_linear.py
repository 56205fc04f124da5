"""Linear evaluation of a checkpoint of any method.

``python -m emp_plugin.main_linear --config-path DIR --config-name NAME [key=value ...]``
"""

import sys

from emp_plugin.command import user_command
from emp_plugin.config import Probe, command_line, read_config
from emp_plugin.training.probing import probe_checkpoint


@user_command
def main(argv: list[str] | None = None) -> None:
    args, overrides = command_line(__doc__, argv)
    probe_checkpoint(read_config(args.config_path, args.config_name, overrides, Probe))


if __name__ == "__main__":
    sys.exit(main())
