"""What the backends by Triton kernels have in common: where they run, and dense rows."""

import functools
import os

import torch

from modules.ops.backends import OK, Call


def availability() -> str:
    """Say "ok", or what is missing."""
    if not torch.cuda.is_available() and not interpreting():
        return "needs a CUDA device, and torch sees none"
    return _importable()


def supports(call: Call) -> str:
    """Say "ok", or why no kernel runs on the call's device or in its dtype."""
    if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
        return f"runs on cuda, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {call.dtype}"
    return OK


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests."""
    return _INTERPRETING


def traced(x: torch.Tensor) -> bool:
    """Whether torch.compile is making a graph of the call, which then is one by kernels.

    The choice of a backend, with its environment variables and its log, is nothing to trace.
    """
    return torch.compiler.is_compiling() and (x.is_cuda or _INTERPRETING)


_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _importable() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux it comes with torch"
    return OK


def dense_rows(x):
    """Make each frame's row dense, or leave None; the rows may lie anywhere."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
