"""The one error that command lines print without a traceback."""


class UserError(ValueError):
    """Something the user can mend: a setting, a path, a file. The message says what is wrong and what to do."""
