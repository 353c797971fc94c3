"""The causal convolution by the CUDA kernel of the causal-conv1d package (BSD), if installed."""

import torch

from modules.ops.backends import OK, Call, extension_availability
from modules.ops.padding import padding_mask


def availability() -> str:
    return extension_availability(
        "causal_conv1d_cuda",
        "causal_conv1d",
        "pip install --no-build-isolation causal-conv1d (needs nvcc)",
    )


def supports(call: Call) -> str:
    if call.device != "cuda":
        return f"runs on cuda, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {call.dtype}"
    if not 2 <= call.width <= 4:
        return f"has kernels of size 2 to 4, not {call.width}"
    if call.initial_state or call.return_state:
        return "is used here without a state"
    return OK


def causal_conv1d(x, weight, bias, activation, lengths, reverse, initial_state, return_state):
    """As `naive.causal_conv1d`, without a state -> result, None"""
    from causal_conv1d import causal_conv1d_fn

    padding = padding_mask(lengths, x.shape[1])
    if padding is not None:
        x = x.masked_fill(padding, 0)
    if reverse:
        x = x.flip(1)  # the padding comes first and is zero, as what precedes the first frame
    # The kernel reads channels last as it is, where whole 16-byte vectors fit.
    x = x.transpose(1, 2) if x.shape[2] % 8 == 0 else x.transpose(1, 2).contiguous()
    with torch.autocast("cuda", enabled=False):
        y = causal_conv1d_fn(x, weight, bias, activation=activation).transpose(1, 2)
    if reverse:
        y = y.flip(1)
    return y if padding is None else y.masked_fill(padding, 0), None
