"""Softmax over a large vocabulary of which CTC wants a few columns: nothing of its size is kept."""

from modules.ops.backends import Backends, Call
from modules.ops.softmax import pytorch, triton

# In the order in which "auto" tries them. Interpreted, for tests, Triton runs only when asked for.
_backends = Backends(
    "softmax",
    "MAMBA_ASR_SOFTMAX_BACKEND",
    {**({} if triton.interpreting() else {"triton": triton}), "torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def normalizers(logits, *, backend="auto"):
    """The logarithm of the sum of exponentials: (B, T, V) -> (B, T), at least float32.

    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_SOFTMAX_BACKEND, then the device.
    Raises UserError on a backend that cannot run.
    """
    return _pick(logits, backend).normalizers(logits)


def scaled_softmax(logits, normalizers, factors, *, backend="auto"):
    """Softmax times a factor a frame, and zero, whatever the logits are, where that is zero.

    logits (B, T, V), their `normalizers` (B, T), factors (B, T) -> (B, T, V) in logits' dtype.
    backend: as of `normalizers`.
    """
    return _pick(logits, backend).scaled_softmax(logits, normalizers, factors)


def _pick(logits, backend):
    call = Call(logits.device.type, logits.dtype, logits.shape[2], False, False, False)
    return _backends.pick(backend, call)
