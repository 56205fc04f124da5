"""Compare methods: ``python -m emp_plugin.main_compare --config-path DIR --config-name NAME ...``.

Then come settings, ``key=value``. Keys of the comparison are methods, ablate, values, seeds,
epochs, minutes, budget, schedule, evaluate_every, thresholds, at_once, results_dir and
report_only. All others are overrides of the recipes, of one method's if they begin with its name:
``emp.data.num_patches=8``.
"""

import sys

from emp_plugin.command import user_command
from emp_plugin.config import command_line
from emp_plugin.studies.run import compare
from emp_plugin.studies.settings import read_comparison


@user_command
def main(argv: list[str] | None = None) -> None:
    args, overrides = command_line(__doc__, argv)
    cfg, recipe_overrides = read_comparison(args.config_path, args.config_name, overrides)
    compare(cfg, args.config_path, recipe_overrides)


if __name__ == "__main__":
    sys.exit(main())
