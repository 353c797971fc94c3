"""The state-space dual as a loop over time: the definition that every other backend must equal."""

import torch

from modules.ops.backends import OK, Call


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def state_space_dual(x, dt, A, B, C, h):
    """Run the recurrence of Dao & Gu 2024 (arXiv 2405.21060), eq. 1 with a scalar A a head.

    x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, N), h (B, H, P, N), T > 0
    -> y (B, T, H, P), h
    """
    x, B, C = (t.to(h.dtype) for t in (x, B, C))
    y = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)  # (B, H)
        dt_x = dt[:, t, :, None] * x[:, t]  # (B, H, P)
        h = decay[:, :, None, None] * h + dt_x.unsqueeze(3) * B[:, t, None, None, :]
        y.append((h * C[:, t, None, None, :]).sum(-1))
    return torch.stack(y, dim=1), h
