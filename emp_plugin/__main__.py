"""``python -m emp_plugin``: the command ``emp``."""

import sys

from emp_plugin.cli import main

sys.exit(main())
