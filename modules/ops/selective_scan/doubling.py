"""The selective scan by doubling: log2 of the frames steps of plain tensor arithmetic.

After step k the pair (decay, state) of frame t spans 2^k frames up to t (Hillis & Steele 1986).
Every factor is a product of decays, at most 1. It holds all states at once, B T D N numbers, and
does log2(T) times the work: it is for graphs that know no loop. A traced graph has the steps that
its example needed, so it holds for that many frames and fewer.
"""

import torch
from torch.nn import functional as F  # noqa: N812

from modules.ops.selective_scan.exported import around, availability, supports

__all__ = ["availability", "selective_scan", "steps", "supports"]


def selective_scan(*arguments):
    """As `naive.selective_scan`."""
    return around(_recurrence, *arguments)


def steps(frames):
    """Doublings until every frame has heard the first."""
    return max(int(frames) - 1, 0).bit_length()


def _recurrence(dt, dt_u, A, B, C, h):
    decay = torch.exp(dt.unsqueeze(-1) * A)  # (B, T, D, N)
    states = dt_u.unsqueeze(-1) * B.unsqueeze(2)
    for k in range(steps(dt.shape[1])):
        # Before the first frame nothing decays and nothing is added.
        past = (0, 0, 0, 0, 2**k, 0)
        states = states + decay * F.pad(states, past)[:, : -(2**k)]
        decay = decay * F.pad(decay, past, value=1.0)[:, : -(2**k)]
    states = states + decay * h.unsqueeze(1)
    return (states * C.unsqueeze(2)).sum(-1), states[:, -1]
