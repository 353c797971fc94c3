"""The selective scan as a loop over time: the definition that every other backend must equal."""

import torch
from torch import nn

from modules.ops.backends import OK, Call
from modules.ops.padding import padding_mask


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state, return_state
):
    """Run eq. 2a and 2b of Gu & Dao 2023 (arXiv 2312.00752), A discretised exactly, B by Euler.

    Arguments as in `modules.ops.selective_scan.selective_scan`, T > 0.
    -> result (B, T, D) in u's dtype, state (B, D, N) in float32 (float64 if u is)
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, frames, channels = u.shape
    result_dtype = u.dtype
    u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
    z = None if z is None else z.to(dtype)
    padding = padding_mask(lengths, frames)
    if padding is not None:
        # Before any arithmetic: 0 x NaN is NaN, in the result or in its gradient.
        u, dt, B, C = (x.masked_fill(padding, 0) for x in (u, dt, B, C))
        z = None if z is None else z.masked_fill(padding, 0)

    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    if padding is not None:
        dt = dt.masked_fill(padding, 0)  # h then passes through padded frames unchanged

    if initial_state is None:
        h = u.new_zeros(batch, channels, A.shape[1])
    else:
        h = initial_state.to(dtype)
    y = [None] * frames
    for t in reversed(range(frames)) if reverse else range(frames):
        decay = torch.exp(dt[:, t, :, None] * A)  # (B, D, N)
        h = decay * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y[t] = (h * C[:, t, None, :]).sum(-1)
    y = torch.stack(y, dim=1)

    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * nn.functional.silu(z)
    if padding is not None:
        y = y.masked_fill(padding, 0)
    return y.to(result_dtype), h
