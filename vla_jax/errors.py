"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something a user can put right. The message is one line that says what is wrong and what to do.

    Entry points print it without a traceback and exit with status 2.
    """
