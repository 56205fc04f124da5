"""What all command lines share."""

import errno
import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from emp_plugin.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def user_command(command: Callable[[list[str] | None], Any]) -> Callable[..., int]:
    """A command line that answers what is no bug with one message on stderr and exit status 1.

    That is a :class:`UserError`, a full disk, Ctrl-C or SIGTERM. ``--debug`` shows the traceback.
    """

    @functools.wraps(command)
    def run(argv: list[str] | None = None) -> int:
        argv = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in argv
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
        try:
            command([item for item in argv if item != "--debug"])
        except (UserError, OSError, KeyboardInterrupt) as error:
            if debug or (isinstance(error, OSError) and error.errno not in NO_ROOM):
                raise
            print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
            return 1
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, before)
        return 0

    return run


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
