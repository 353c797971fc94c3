"""One frame of a Mamba layer by two Triton kernels in place of about twenty of PyTorch's.

A search runs a step for each token, and on a GPU the number of kernels is what it costs. States and
sums are float32. TRITON_INTERPRET=1 (set before triton is imported) runs it on a CPU, for tests.
"""

import torch

from modules.ops import kernels
from modules.ops.backends import OK, Call
from modules.ops.kernels import availability, interpreting  # noqa: F401

CHANNELS = 64  # a program's


def supports(call: Call) -> str:
    reason = kernels.supports(call)
    if reason != OK:
        return reason
    if call.width > 64:
        return f"holds at most 64 states, not {call.width}"
    if call.needs_grad:
        return "has no backward"
    return OK


def conv_step(x, weight, bias, state):
    """As `pytorch.conv_step`."""
    from modules.ops.mamba_step.triton_kernels import conv_kernel

    batch, channels = x.shape
    width = weight.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_state = torch.empty(batch, channels, width - 1, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        conv_kernel[grid(x)](
            x,
            weight.contiguous(),
            bias,
            state.contiguous(),
            y,
            new_state,
            channels,
            x.stride(0),
            WIDTH=width,
            CHANNELS=CHANNELS,
        )
    return y, new_state


def scan_step(x, dt, A_log, B, C, D, z, dt_bias, h):
    """As `pytorch.scan_step`."""
    from modules.ops.mamba_step.triton_kernels import scan_kernel

    states = A_log.shape[1]
    rows = (x, dt, B, C, z)
    x, dt, B, C, z = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in rows)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = h.float().contiguous()
    new_h = torch.empty_like(h)
    with torch.cuda.device_of(x):
        scan_kernel[grid(x)](
            x,
            dt,
            A_log.contiguous(),
            B,
            C,
            D,
            z,
            dt_bias,
            h,
            y,
            new_h,
            x.shape[1],
            states,
            *(0 if t is None else t.stride(0) for t in (x, dt, B, C, z)),
            N=max(1 << (states - 1).bit_length(), 2),
            CHANNELS=CHANNELS,
        )
    return y, new_h


def grid(x):
    """A program a row and block of channels."""
    return -(-x.shape[1] // CHANNELS), x.shape[0]
