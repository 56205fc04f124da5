"""The one error that command lines print without a traceback."""


class UserError(ValueError):
    """Something the user can mend: a setting, a path, a file.

    The message says what is wrong and what to do.
    """

    def __init__(self, message: str):
        # torch repeats a data worker's error with the worker's whole traceback as its message
        super().__init__(message.rpartition(f"{__name__}.UserError: ")[2].rstrip())
