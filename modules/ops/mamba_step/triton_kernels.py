"""Triton kernels of a Mamba layer's step: one program a (hypothesis, block of channels).

d numbers channels, n states, k the taps of the convolution, oldest first.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_frames import LOG2E, step_size


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def conv_kernel(
    x, weight, bias, state, y, new_state, channels, x_b, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):
    """x, y (B, D); weight (D, K); state, new_state (B, D, K - 1)."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    newest = tl.load(x + b * x_b + d, mask=mask, other=0.0)
    total = tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    row = (b * channels + d) * (WIDTH - 1)
    for k in tl.static_range(WIDTH - 1):
        # Inputs are kept in x's type, as they were read.
        value = tl.load(state + row + k, mask=mask, other=0.0).to(newest.dtype)
        w = tl.load(weight + d * WIDTH + k, mask=mask, other=0.0).to(tl.float32)
        total += w * value.to(tl.float32)
        if k > 0:
            tl.store(new_state + row + k - 1, value, mask=mask)
    w = tl.load(weight + d * WIDTH + WIDTH - 1, mask=mask, other=0.0).to(tl.float32)
    total += w * newest.to(tl.float32)
    if WIDTH > 1:
        tl.store(new_state + row + WIDTH - 2, newest, mask=mask)
    tl.store(y + b * channels + d, silu(total), mask=mask)


@triton.jit
def scan_kernel(
    x, dt, A_log, B, C, D, z, dt_bias, h, y, new_h, channels, states,
    x_b, dt_b, B_b, C_b, z_b,
    N: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x, dt, z, y (B, D); B, C (B, N); A_log (D, N); h, new_h (B, D, N)."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N)
    d_mask, n_mask = d < channels, n < states
    mask = d_mask[:, None] & n_mask[None, :]
    tile = d[:, None] * states + n[None, :]

    u = tl.load(x + b * x_b + d, mask=d_mask, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    step, _ = step_size(tl.load(dt + b * dt_b + d, mask=d_mask, other=0.0), bias, True, True)
    A = tl.load(A_log + tile, mask=mask, other=0.0).to(tl.float32)
    A = -tl.exp2(A * LOG2E) * LOG2E
    row_B = tl.load(B + b * B_b + n, mask=n_mask, other=0.0).to(tl.float32)
    row_C = tl.load(C + b * C_b + n, mask=n_mask, other=0.0).to(tl.float32)
    before = tl.load(h + b * channels * states + tile, mask=mask, other=0.0)
    after = tl.exp2(step[:, None] * A) * before + (step * u)[:, None] * row_B[None, :]
    tl.store(new_h + b * channels * states + tile, after, mask=mask)

    result = tl.sum(after * row_C[None, :], axis=1)
    result += tl.load(D + d, mask=d_mask, other=0.0).to(tl.float32) * u
    if z is not None:
        result *= silu(tl.load(z + b * z_b + d, mask=d_mask, other=0.0).to(tl.float32))
    tl.store(y + b * channels + d, result, mask=d_mask)
