"""CTC (Graves et al. 2006) of scores, with its gradient, and softmax over a large vocabulary.

CTC wants a few columns of the vocabulary; of the others it needs their sum alone, and their softmax
as the gradient. Nothing of the size of the logits is kept.
"""

import torch

from modules.ops.backends import Backends, Call
from modules.ops.ctc import pytorch, triton

# In the order in which "auto" tries them. Interpreted, for tests, Triton runs only when asked for.
_backends = Backends(
    "ctc",
    "MAMBA_ASR_CTC_BACKEND",
    {**({} if triton.interpreting() else {"triton": triton}), "torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def ctc(scores, labels, lengths, label_lengths, blank, *, needs_grad=True, backend="auto"):
    """The loss of each utterance, and its gradient with respect to what the scores are softmax of.

    scores: (B, T, C) in float32 or float64, logarithms of probabilities that sum to at most 1 in
        a frame
    labels: (B, U), columns of the scores; lengths: (B,) frames; label_lengths: (B,)
    blank: the column of blank
    needs_grad: whether the gradient is wanted
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_CTC_BACKEND, then the device.
    -> losses (B,), inf where labels do not fit into the frames; gradient (B, T, C), softmax less
    posterior, or None. It means nothing past a length and where the loss is inf.
    Raises ValueError on shapes that do not fit, UserError on a backend that cannot run.
    """
    B, T, _ = scores.shape
    if T == 0 or len(labels) != B or lengths.shape != (B,) or label_lengths.shape != (B,):
        shapes = (tuple(x.shape) for x in (scores, labels, lengths, label_lengths))
        raise ValueError(
            "expected (B, T, C) with T > 0, (B, U), (B,) and (B,); found "
            + ", ".join(map(str, shapes))
        )
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores are {scores.dtype}; expected float32 or float64")
    return _pick(scores, needs_grad, backend).ctc(
        scores, labels, lengths, label_lengths, blank, needs_grad
    )


def normalizers(logits, *, backend="auto"):
    """The logarithm of the sum of exponentials: (B, T, V) -> (B, T), at least float32.

    backend: as of `ctc`.
    """
    return _pick(logits, False, backend).normalizers(logits)


def scaled_softmax(logits, normalizers, factors, columns, values, *, backend="auto"):
    """Softmax, but in some columns other values, times a factor a frame.

    logits (B, T, V), their `normalizers` (B, T), factors (B, T), columns (B, C) of an utterance,
    which may come twice with the same values (B, T, C) -> (B, T, V) in logits' dtype: zero,
    whatever the rest is, where the factor is zero.
    backend: as of `ctc`.
    """
    backend = _pick(logits, False, backend)
    return backend.scaled_softmax(logits, normalizers, factors, columns, values)


def _pick(x, needs_grad, backend):
    call = Call(x.device.type, x.dtype, 1, needs_grad, initial_state=False, return_state=False)
    return _backends.pick(backend, call)
