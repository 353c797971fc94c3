"""The selective scan as a loop in C, built with the system's compiler: a bound for CPUs."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("scan_loop.c")
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]


def availability():
    """Say "ok", or why there is no such loop here."""
    if shutil.which("cc") is None:
        return "needs a C compiler, and there is no cc on the PATH"
    try:
        _library()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()
        return f"cc {' '.join(FLAGS)} fails: {reason[-1] if reason else 'no reason given'}"
    return "ok"


@functools.cache
def _library():
    text = SOURCE.read_bytes() + " ".join(FLAGS).encode()
    folder = Path(tempfile.gettempdir()) / f"mamba-asr-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"scan-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            built = Path(beside) / path.name
            subprocess.run(
                ["cc", *FLAGS, "-o", str(built), str(SOURCE), "-lm"],
                check=True,
                capture_output=True,
                text=True,
            )
            built.replace(path)
    return ctypes.CDLL(str(path))


def forward_backward(inputs, dy):
    """Inputs of `selective_scan` with dt_softplus, float32 on the CPU, and dy -> y, gradients.

    The gradients by name, in the order of the inputs.
    """
    tensors, dy = {name: x.detach().contiguous() for name, x in inputs.items()}, dy.contiguous()
    batch, frames, channels = tensors["u"].shape
    states = tensors["A"].shape[1]
    assert states <= 64, "the loop in C takes at most 64 states"
    apart = ("A", "D", "dt_bias")  # gradients of each utterance, as threads sum them apart
    gradients = {
        name: x.new_empty(batch, *x.shape) if name in apart else torch.empty_like(x)
        for name, x in tensors.items()
    }
    y, order = torch.empty_like(tensors["u"]), ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    sizes = [ctypes.c_long(n) for n in (batch, frames, channels, states)]
    given = [*sizes, *map(address, (tensors[k] for k in order))]
    _library().scan_forward(*given, address(y))
    _library().scan_backward(*given, address(dy), *map(address, (gradients[k] for k in order)))
    return y, {k: g.sum(0) if k in apart else g for k, g in gradients.items()}


def address(x):
    return ctypes.c_void_p(x.data_ptr())
