"""Exceptions that mean something to a command: above all, "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave: says the value, what was expected and the remedy.

    The command lines print it without a stack trace and exit with status 2.
    """


class MissingKey(UserError, AttributeError):  # noqa: N818
    """A recipe lacks a key; to `hasattr`, and `getattr` with a default, a missing attribute."""


class Stopped(KeyboardInterrupt):
    """A run was asked to end, and has saved what it takes to go on."""


def out_of_memory(error):
    """Whether that is why PyTorch failed; on CPU and MPS the text alone tells.

    cuFFT calls it an internal error (github.com/pytorch/pytorch/issues/119420).
    """
    words = "out of memory", "can't allocate memory", "not enough memory", "CUFFT_INTERNAL_ERROR"
    return type(error).__name__ == "OutOfMemoryError" or any(w in str(error) for w in words)
