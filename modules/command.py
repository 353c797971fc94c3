"""How a command ends: a mistake or Ctrl-C is told in a line, and the exit status says which."""

import contextlib
import os
import sys

from modules.errors import UserError


@contextlib.contextmanager
def plain_errors(interrupted="interrupted", then=None, failures=(OSError,)):
    """Exit with 2 after a UserError, 130 after Ctrl-C; 1 where stdout's reader has enough.

    Arguments
    ---------
    interrupted : str
        What Ctrl-C leaves behind, for the user.
    then : str
        The same of `failures`: a full disk, a folder without permission.
    failures : tuple of exception types
        What the machine may do to the command; its text is the message.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        end(f"error: {error}", 2)
    except BrokenPipeError:  # of a reader such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except failures as error:
        end(f"error: {error}" + (f"; {then}" if then else ""), 2)
    except KeyboardInterrupt:
        end(f"\n{interrupted}", 130)


def end(text, status):
    print(text, file=sys.stderr)
    sys.exit(status)
