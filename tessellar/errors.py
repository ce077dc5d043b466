"""The one exception that stands for a user's mistake: the command line prints it as one line, without a traceback."""


class UserError(Exception):
    """What is wrong, where (key, file, line), and what would be right, in one short message."""
