"""What commands share: a mistake or Ctrl-C is told in a line, and the exit status says which."""

import argparse
import contextlib
import math
import os
import re
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
        end(f"error: {without_number(error)}" + (f"; {then}" if then else ""), 2)
    except KeyboardInterrupt:
        end(f"\n{interrupted}", 130)


def argument_parser(description, examples, prog=None):
    """Of argparse; the help ends in examples, line by line as they are written."""
    return Parser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class Parser(argparse.ArgumentParser):
    """Argparse's, which takes `--option -4,-8` for what it is: argparse takes -4 alone."""

    def parse_known_args(self, args=None, namespace=None):
        joined = []
        for word in sys.argv[1:] if args is None else args:
            values = re.fullmatch(r"-[\d.]+(,-?[\d.]+)+", word)
            if values and joined and re.fullmatch(r"--[^=]+", joined[-1]):
                word = f"{joined.pop()}={word}"
            joined.append(word)
        return super().parse_known_args(joined, namespace)


def count(text):
    """A whole number above 0, as a type for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def threads(text):
    """A number of threads, as a type for argparse; OpenMP has no memory for many thousands."""
    if (number := count(text)) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 to 1024, as many as there are cores")
    return number


def number(text):
    """A number that is finite, as a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, such as 0.5")
    return value


def without_number(error):
    """What happened, after the file's name; of the operating system without errno."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def end(text, status):
    print(text, file=sys.stderr)
    sys.exit(status)
