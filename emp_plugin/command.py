"""What all command lines share."""
import functools
import sys
from collections.abc import Callable
from typing import Any

from emp_plugin.errors import UserError


def user_command(command: Callable[[list[str] | None], Any]) -> Callable[[list[str] | None], int]:
    """A command line that answers a :class:`UserError` with its message on stderr and exit status 1."""

    @functools.wraps(command)
    def run(argv: list[str] | None = None) -> int:
        try:
            command(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    return run
