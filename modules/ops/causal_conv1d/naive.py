"""The causal depthwise convolution as a loop over time: what every other backend must equal."""

import torch
from torch import nn

from modules.ops.backends import OK, Call
from modules.ops.padding import padding_mask


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def causal_conv1d(x, weight, bias, activation, lengths, reverse, initial_state, return_state):
    """Arguments as in `modules.ops.causal_conv1d.causal_conv1d`, T > 0.

    -> result (B, T, D), state (B, D, K - 1), both in x's dtype
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, frames, channels = x.shape
    weight = weight.to(dtype)
    padding = padding_mask(lengths, frames)
    inputs = x.to(dtype)
    if padding is not None:
        # Before any arithmetic: 0 x NaN is NaN, in the result or in its gradient.
        inputs = inputs.masked_fill(padding, 0)
    if initial_state is None:
        state = inputs.new_zeros(batch, channels, weight.shape[1] - 1)
    else:
        state = initial_state.to(dtype)

    y = [None] * frames
    for t in reversed(range(frames)) if reverse else range(frames):
        window = torch.cat([state, inputs[:, t, :, None]], dim=-1)  # (B, D, K), oldest first
        y[t] = (window * weight).sum(-1)
        shifted = window[..., 1:]
        state = shifted if padding is None else torch.where(padding[:, t, :, None], state, shifted)
    y = torch.stack(y, dim=1)

    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = nn.functional.silu(y)
    if padding is not None:
        y = y.masked_fill(padding, 0)
    return y.to(x.dtype), state.to(x.dtype)
