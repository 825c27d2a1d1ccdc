"""The one base class of every error that a user's input can cause."""


class UserError(ValueError):
    """Bad input: a file, field, flag or gin binding that is wrong.

    The message names what is at fault and what would be right, so the launcher
    prints it alone, without a traceback, and exits with code 2.
    """
