"""CTC prefixes of a beam search, a token longer or about to be: sums over frames in logarithms.

Of every hypothesis are kept, after t = 0 .. T frames, the logarithms of the probabilities that they
read as its prefix: `blank` ending in blank, `total` either way, both (R, 1 + T) in float64. Names
and recursions are those of `modules.search.prefix`.
"""

from modules.ops.backends import Backends, Call
from modules.ops.ctc_prefix import pytorch, triton

# In the order in which "auto" tries them. Interpreted, for tests, Triton runs only when asked for.
_backends = Backends(
    "ctc_prefix",
    "MAMBA_ASR_PREFIX_BACKEND",
    {**({} if triton.interpreting() else {"triton": triton}), "torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def extend(probs, rows, valid, blanks, blank, total, predecessors, repeats, *, backend="auto"):
    """Prefixes g + c from those g of the step before: R hypotheses, each a row.

    probs: (X, T) float64, of one token a row; rows: (R,), that of a hypothesis's new token c
    valid: (R, T) bool, frames of the utterance
    blanks: (R, 1 + T), of the empty prefix: sums of blank's log-probabilities
    blank, total: (R, 1 + T), of the prefixes before
    predecessors: (R,), whom of them each hypothesis extends; repeats: (R,) bool, whether c is the
        last token of it
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_PREFIX_BACKEND, then the device.
    -> blank, total: (R, 1 + T), new tensors
    Raises UserError on a backend that cannot run.
    """
    run = _pick(probs, backend)
    return run.extend(probs, rows, valid, blanks, blank, total, predecessors, repeats)


def weights(probs, rows, valid, blank, total, *, backend="auto"):
    """What the sums over frames of all next tokens weigh their probabilities with.

    probs, valid, blank, total as in `extend`; rows: (R,), that of the prefix's last token
    -> weights (R, T), total / exp(largest) after 0 .. T - 1 frames, 0 in padding; largest (R, 1), 0
    where nothing is possible; again (R, 1): the logarithm of what the last token has, once more
    """
    return _pick(probs, backend).weights(probs, rows, valid, blank, total)


def _pick(probs, backend):
    call = Call(probs.device.type, probs.dtype, probs.shape[1], False, False, False)
    return _backends.pick(backend, call)
