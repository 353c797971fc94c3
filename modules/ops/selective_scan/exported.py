"""What the backends for exported graphs share: all of the scan but its recurrence.

No Python loop over frames, so that a graph traced at one length holds for every other; none is
chosen by "auto", and none has a gradient. An exporter takes one by `exporting`.
"""

import torch
from torch import nn

from modules.ops.backends import OK, Call
from modules.ops.padding import padding_mask


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return "has no gradient: it is for exported graphs" if call.needs_grad else OK


def around(
    recurrence,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    lengths,
    reverse,
    initial_state,
    return_state,
):
    """As `naive.selective_scan`, with its loop by `recurrence`.

    recurrence(dt, dt u (B, T, D), A (D, N), B, C (B, T, N), h (B, D, N)) -> y (B, T, D), last h;
    forward in time, T > 0.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    result_dtype = u.dtype
    u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))
    padding = padding_mask(lengths, u.shape[1])
    if padding is not None:
        u, dt, B, C = (x.masked_fill(padding, 0) for x in (u, dt, B, C))
        z = None if z is None else z.masked_fill(padding, 0)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    if padding is not None:
        dt = dt.masked_fill(padding, 0)  # h then passes through padded frames unchanged

    h = initial_state
    # Zeros whose batch a tracer follows.
    h = torch.zeros_like(u[:, 0, :, None] * A) if h is None else h.to(dtype)
    inputs = [x.flip(1) if reverse else x for x in (dt, dt * u, B, C)]
    y, h = recurrence(*inputs[:2], A, *inputs[2:], h)
    if reverse:
        y = y.flip(1)

    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * nn.functional.silu(z.to(dtype))
    if padding is not None:
        y = y.masked_fill(padding, 0)
    return y.to(result_dtype), h
