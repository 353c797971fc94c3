"""CTC (Graves et al. 2006) of scores, with its gradient: Graves' forward-backward algorithm."""

from modules.ops.backends import Backends, Call
from modules.ops.ctc import pytorch, triton

# In the order in which "auto" tries them: the kernels have not been measured on a GPU yet.
_backends = Backends(
    "ctc",
    "MAMBA_ASR_CTC_BACKEND",
    {"torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def ctc(scores, labels, lengths, label_lengths, blank, *, needs_grad=True, backend="auto"):
    """The loss of each utterance, and its gradient with respect to what the scores are softmax of.

    scores: (B, T, C), logarithms of probabilities that sum to at most 1 in a frame
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
    call = Call(
        scores.device.type, scores.dtype, 1, needs_grad, initial_state=False, return_state=False
    )
    return _backends.pick(backend, call).ctc(
        scores, labels, lengths, label_lengths, blank, needs_grad
    )
