"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave: says the value, what was expected and the remedy.

    The command lines print it without a stack trace and exit with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A run was asked to end, and has saved what it takes to go on."""
