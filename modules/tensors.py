"""Files of tensors from anywhere: read without running what a pickle may hold."""

import contextlib
import os
import pickle
import re
import shutil

import torch

from modules.errors import UserError
from modules.whole import whole

FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# PyTorch's writer does not say "no space left", but in these ways that it could not write.
WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")


def save_tensors(tensors, path):
    """Write them to a file, whole or not at all; UserError where the disk does not take them."""
    try:
        with whole(path) as beside:
            torch.save(tensors, beside)
    except RuntimeError as error:
        if not unwritten(error):
            raise
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        raise UserError(
            f"{path} could not be written; {free / 1e6:,.0f} MB are free there. Make room (look at "
            "quotas too), or write elsewhere"
        ) from None


def unwritten(error):
    """Whether torch.save's RuntimeError says that a file could not be written."""
    return any(words in str(error) for words in WRITER)


def load_tensors(path, **options):
    """A file of tensors and plain values, on the CPU; nothing in it is executed.

    UserError when the file is damaged, or holds anything else.
    """
    try:
        with no_code(path):
            return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a file of any bytes may fail in any way
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{path} ({os.path.getsize(path)} bytes) is damaged: {reason}; copy it again"
        ) from None


@contextlib.contextmanager
def no_code(path):
    """UserError that says what is wrong with a file, or folder, that PyTorch does not unpickle.

    PyTorch's own message tells how to read it all the same.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]*\w)", str(error)):
            raise UserError(
                f"{path} holds {found[1]}, which is no tensor or number: reading it could run any "
                "code, so it is refused; ask for a file of weights alone"
            ) from None
        raise UserError(f"{path} is damaged, or no file of weights; copy it again") from None


def check_environment():
    """UserError when PyTorch is told to run whatever a checkpoint holds."""
    if os.environ.get(FORCED, "0").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"{FORCED} is set, so that reading a checkpoint could run any code; unset it"
        )


def misfits(module, weights, config):
    """Lines naming the weights that are missing, unexpected or misshapen; empty when all fit.

    config : what decided on the module's shapes, by name.
    """
    wanted = module.state_dict()
    lines = [f"missing weight {name!r}" for name in wanted if name not in weights]
    lines += [f"unexpected weight {name!r}" for name in weights if name not in wanted]
    lines += [
        f"weight {name!r} has shape {tuple(weights[name].shape)}, {config} wants "
        f"{tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if len(lines) > 10:
        lines[10:] = [f"... and {len(lines) - 10} more"]
    return "\n".join(f"  {line}" for line in lines)
