"""One frame of a Mamba layer's convolution and scan, written out: what Triton's must equal."""

import torch
from torch.nn import functional as F  # noqa: N812

from modules.ops.backends import OK, Call


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def conv_step(x, weight, bias, state):
    """As `modules.ops.causal_conv1d` with silu, for T = 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state.to(x.dtype), x.unsqueeze(-1)], dim=-1)
    y = (window.to(dtype) * weight).sum(-1) + bias
    return F.silu(y).to(x.dtype), window[..., 1:]


def scan_step(x, dt, A_log, B, C, D, z, dt_bias, h):
    """As `modules.ops.selective_scan` with softplus and A = -exp(A_log), for T = 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(dt.to(dtype) + dt_bias)
    decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(A_log))
    h = decay * h + (dt * x).unsqueeze(-1) * B.to(dtype).unsqueeze(1)
    y = (h * C.to(dtype).unsqueeze(1)).sum(-1) + D * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), h
