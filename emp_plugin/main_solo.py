"""Run a program of solo-learn's own with what this project adds.

``python -m emp_plugin.main_solo PROGRAM.py [argument ...]``
"""

import runpy
import sys
from pathlib import Path

import emp_plugin.config  # noqa: F401  EMP, solo-learn's repairs, what our YAML refers to
from emp_plugin.command import user_command
from emp_plugin.errors import UserError


@user_command
def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or not Path(arguments[0]).is_file():
        raise UserError(
            f"{arguments[0] if arguments else 'nothing'} is no program; "
            "give the path of solo-learn's main_pretrain.py, main_linear.py, ..."
        )
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
