"""Triton kernels of the gated mean: one program a (frame, block of channels, utterance)."""

import triton
import triton.language as tl

from modules.ops.causal_conv1d.triton_kernels import sigmoid


@triton.jit
def load_mean(y, b, t, d, mask, y_d, y_b, y_t):
    """1/2 (y_0 + y_1) of frame t, in float32."""
    row = y + b * y_b + t * y_t + d
    total = tl.load(row, mask=mask, other=0).to(tl.float32)
    return 0.5 * (total + tl.load(row + y_d, mask=mask, other=0).to(tl.float32))


@triton.jit
def forward_kernel(y, z, out, channels, y_d, y_b, y_t, z_b, z_t, CHANNELS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    mean = load_mean(y, b, t, d, mask, y_d, y_b, y_t)
    gate = tl.load(z + b * z_b + t * z_t + d, mask=mask, other=0).to(tl.float32)
    value = mean * gate * sigmoid(gate)
    row = (b * tl.num_programs(0) + t) * channels
    tl.store(out + row + d, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    y, z, dout, dy, dz,
    channels, y_d, y_b, y_t, z_b, z_t, dout_b, dout_t,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """dy (B, T, D) is the gradient of y_0, and of y_1."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    mean = load_mean(y, b, t, d, mask, y_d, y_b, y_t)
    gate = tl.load(z + b * z_b + t * z_t + d, mask=mask, other=0).to(tl.float32)
    dvalue = tl.load(dout + b * dout_b + t * dout_t + d, mask=mask, other=0).to(tl.float32)
    s = sigmoid(gate)
    row = (b * tl.num_programs(0) + t) * channels
    dmean = 0.5 * dvalue * gate * s
    tl.store(dy + row + d, dmean.to(dy.dtype.element_ty), mask=mask)
    dgate = dvalue * mean * s * (1.0 + gate * (1.0 - s))
    tl.store(dz + row + d, dgate.to(dz.dtype.element_ty), mask=mask)
