"""CTC prefixes in plain PyTorch, on any device with float64: what Triton's kernels must equal."""

import torch

from modules.ops.backends import OK, Call

MINUS_INF = float("-inf")


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def extend(probs, rows, valid, blanks, blank, total, predecessors, repeats):
    """As `modules.ops.ctc_prefix.extend`."""
    blank, total = (x.index_select(0, predecessors) for x in (blank, total))
    phi = torch.where(repeats.unsqueeze(1), blank, total)[:, :-1]
    log_probs = log_probs_of(probs, rows, valid)
    sums = log_probs.cumsum(1)
    nonblank = sums + torch.logcumsumexp(phi - (sums - log_probs), dim=1)
    nonblank = nonblank.masked_fill(~valid, MINUS_INF)
    # b_t hears of n up to t - 1 frames, and n_0 is none.
    before = torch.logcumsumexp(nonblank[:, :-1] - blanks[:, 1:-1], dim=1)
    blank[:, :2].fill_(MINUS_INF)
    torch.add(blanks[:, 2:], before, out=blank[:, 2:])
    total[:, :1].fill_(MINUS_INF)
    torch.logaddexp(nonblank, blank[:, 1:], out=total[:, 1:])
    return blank, total


def weights(probs, rows, valid, blank, total):
    """As `modules.ops.ctc_prefix.weights`."""
    before = total[:, :-1].masked_fill(~valid, MINUS_INF)
    largest = finite(before.amax(1, keepdim=True))
    again = blank[:, :-1] + log_probs_of(probs, rows, valid)
    again = again.masked_fill(~valid, MINUS_INF).logsumexp(1, keepdim=True)
    return (before - largest).exp(), largest, again


def log_probs_of(probs, rows, valid):
    """probs (X, T), rows (R,) -> their logarithms (R, T); 0 in padding."""
    return probs.index_select(0, rows).log().masked_fill(~valid, 0.0)


def finite(x):
    """Zero for minus infinity, so that nothing subtracts it from itself."""
    return x.masked_fill(x == MINUS_INF, 0.0)
