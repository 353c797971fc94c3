"""Files of tensors from anywhere: read without running what a pickle may hold."""

import contextlib
import os
import pickle
import re

import torch

from modules.errors import UserError

FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_tensors(path, **options):
    """A file of tensors and plain values, on the CPU; nothing in it is executed.

    UserError when the file is damaged, or holds anything else.
    """
    try:
        with no_code(path):
            return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
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
