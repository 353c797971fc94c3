"""The causal depthwise convolution in plain PyTorch, on any device."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from modules.ops.backends import OK, Call
from modules.ops.padding import padding_mask

# Up to this size K multiply-adds over the whole sequence beat PyTorch's grouped convolution: about
# 3x on two CPU cores at K = 4, forward and backward, B 4, T 400, D 512; at K = 8 they do not.
SHIFT_MAX_KERNEL = 4


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def causal_conv1d(x, weight, bias, activation, lengths, reverse, initial_state, return_state):
    """As `naive.causal_conv1d`; the state is None unless asked for."""
    frames, kernel = x.shape[1], weight.shape[1]
    padding = padding_mask(lengths, frames)
    if padding is not None:
        x = x.masked_fill(padding, 0)
    full = _with_past(x, kernel - 1, lengths, reverse, initial_state)
    taps = weight.flip(1) if reverse else weight  # the window starts at t either way
    with torch.autocast(x.device.type, enabled=False):
        if kernel <= SHIFT_MAX_KERNEL:
            # A compiler fuses the shifts; TorchDynamo 2.11 would lose the function's gradient.
            # A traced model that holds the function cannot be saved.
            compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
            y = (_shifted_sum if compiling else _ShiftedSum.apply)(full, taps, bias)
        else:
            bias = None if bias is None else bias.to(x.dtype)
            taps = taps[:, None].to(x.dtype)
            y = nn.functional.conv1d(full.transpose(1, 2), taps, bias, groups=taps.shape[0])
            y = y.transpose(1, 2)
    if activation == "silu":
        y = nn.functional.silu(y)
    if padding is not None:
        y = y.masked_fill(padding, 0)
    return y, _state(full, kernel - 1, lengths, reverse) if return_state else None


def _with_past(x, past, lengths, reverse, initial_state):
    """Put what precedes the first frame, in scan order, beside x -> (B, T + K - 1, D).

    In reverse that is after each utterance's own last frame, newest first.
    """
    if not reverse:
        if initial_state is None:
            return nn.functional.pad(x, (0, 0, past, 0))
        return torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
    full = nn.functional.pad(x, (0, 0, 0, past))
    if initial_state is None:
        return full
    newest_first = initial_state.transpose(1, 2).flip(1).to(x.dtype)
    return full.scatter(1, _positions(x, past, lengths), newest_first)


def _state(full, past, lengths, reverse):
    """The last K - 1 inputs in scan order, oldest first -> (B, D, K - 1)"""
    if reverse:
        return full[:, :past].flip(1).transpose(1, 2)
    frames = full[:, past:]
    return full.gather(1, _positions(frames, past, lengths)).transpose(1, 2)


def _positions(x, past, lengths):
    """The K - 1 positions from each utterance's length on -> (B, K - 1, D)"""
    batch, frames, channels = x.shape
    if lengths is None:
        lengths = torch.full((batch,), frames, device=x.device)
    steps = torch.arange(past, device=x.device)
    return (lengths.long()[:, None] + steps)[:, :, None].expand(batch, past, channels)


class _ShiftedSum(torch.autograd.Function):
    """full (B, T + K - 1, D), taps (D, K), bias (D,) -> y_t = bias + sum_k taps_k full_{t + k}

    Sums are float32 (float64 if full is). Autograd over the same shifts would pad every gradient
    back to the full length, one copy a tap.
    """

    @staticmethod
    def forward(ctx, full, taps, bias):
        ctx.save_for_backward(full, taps)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dtype = _sum_dtype(full)
        weights = taps.to(dtype).t().contiguous()  # (K, D)
        inputs = full.to(dtype)
        frames = full.shape[1] - len(weights) + 1
        y = inputs[:, :frames] * weights[0]
        for k in range(1, len(weights)):
            y.addcmul_(inputs[:, k : k + frames], weights[k])
        if bias is not None:
            y += bias.to(dtype)
        return y.to(full.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        full, taps = ctx.saved_tensors
        dtype = _sum_dtype(full)
        weights = taps.to(dtype).t().contiguous()
        inputs, dy = full.to(dtype), dy.to(dtype)
        frames = dy.shape[1]
        dfull = torch.zeros_like(inputs)
        dweights = torch.empty_like(weights)
        product = torch.empty_like(dy)
        for k in range(len(weights)):
            dfull[:, k : k + frames].addcmul_(dy, weights[k])
            torch.mul(dy, inputs[:, k : k + frames], out=product)
            dweights[k] = product.sum((0, 1))
        dbias = None if ctx.bias_dtype is None else dy.sum((0, 1)).to(ctx.bias_dtype)
        return dfull.to(full.dtype), dweights.t().to(taps.dtype), dbias


def _shifted_sum(full, taps, bias):
    """As `_ShiftedSum`, with autograd's own gradient."""
    dtype = _sum_dtype(full)
    width = taps.shape[1]
    frames = full.shape[1] - width + 1
    inputs, weights = full.to(dtype), taps.to(dtype)
    y = sum(inputs[:, k : k + frames] * weights[:, k] for k in range(width))
    return (y if bias is None else y + bias.to(dtype)).to(full.dtype)


def _sum_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
