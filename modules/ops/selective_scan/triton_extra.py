# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""The selective scan's extra channels: what four lanes share besides a channel of each.

What is a number a channel is a lane's work for its own channel. An extra channel's is done for a
chunk of frames at once: a lane counts it for one frame of them, `own`, and gives it to the group
when the frame's turn comes, or gathers the frame's sums. A tuple holds EXTRA of each number.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_frames import (
    at,
    bias_of,
    parameter,
    silu_and_slope,
    step_size,
)
from modules.ops.selective_scan.triton_layout import LANES, channel, halve


@triton.jit
def extra_channels(block, channels, d, EXTRA: tl.constexpr):
    """-> offsets from the lane's own channel d: to read from, to write to; whether they exist"""
    read = ()
    written = ()
    there = ()
    for e in tl.static_range(EXTRA):
        other = channel(block, 4 + e, EXTRA)
        read = read + (tl.minimum(other, channels - 1) - tl.minimum(d, channels - 1),)
        written = written + (other - d,)
        there = there + (other < channels,)
    return read, written, there


@triton.jit
def extra_parameters(D, dt_bias, group, channels, block, EXTRA: tl.constexpr):
    """-> D, dt_bias (-inf at channels that there are not)"""
    skips = ()
    biases = ()
    for e in tl.static_range(EXTRA):
        d = channel(block, 4 + e, EXTRA)
        skips = skips + (parameter(D, group, channels, tl.minimum(d, channels - 1)),)
        biases = biases + (bias_of(dt_bias, group, channels, d),)
    return skips, biases


@triton.jit
def load_extra(u, dt, z, offsets, t, u_t, dt_t, z_t):
    """-> (u, dt and z (0 if there is none)) of each extra channel, at the lane's frame t"""
    rows = ()
    for e in tl.static_range(len(offsets)):
        gate = 0.0 if z is None else tl.load(at(z + offsets[e], t, z_t))
        u_e = tl.load(at(u + offsets[e], t, u_t))
        rows = rows + ((u_e, tl.load(at(dt + offsets[e], t, dt_t)), gate),)
    return rows


@triton.jit
def load_extra_dy(dy, offsets, t, dy_t):
    """-> dy of each extra channel, at the lane's frame t"""
    rows = ()
    for e in tl.static_range(len(offsets)):
        rows = rows + (tl.load(at(dy + offsets[e], t, dy_t)),)
    return rows


@triton.jit
def extra_steps(rows, biases, valid, SOFTPLUS: tl.constexpr):
    """-> steps, their slopes, dt u"""
    steps = ()
    slopes = ()
    dt_u = ()
    for e in tl.static_range(len(rows)):
        step, slope = step_size(rows[e][1], biases[e], valid, SOFTPLUS)
        steps = steps + (step,)
        slopes = slopes + (slope,)
        dt_u = dt_u + (step * rows[e][0].to(tl.float32),)
    return steps, slopes, dt_u


@triton.jit
def extra_gradients(rows, dy, z, valid):
    """-> the gradient of results before the gate; of the gate, but for the result as a factor"""
    before_gate = ()
    of_gate = ()
    for e in tl.static_range(len(rows)):
        dy_e = tl.where(valid, dy[e].to(tl.float32), 0.0)
        if z is not None:
            silu, slope = silu_and_slope(rows[e][2])
            of_gate = of_gate + (dy_e * slope,)
            dy_e *= silu
        before_gate = before_gate + (dy_e,)
    return before_gate, of_gate


@triton.jit
def store_zeros(p, offsets, there):
    """A row of zeros at p, of the extra channels."""
    for e in tl.static_range(len(offsets)):
        tl.store(p + offsets[e], tl.zeros([LANES], p.dtype.element_ty), mask=there[e])


@triton.jit
def of_frame(values, i, CHUNK: tl.constexpr):
    """Numbers of a chunk's frames, each in lanes of its own -> those of frame i, in all four."""
    lane = tl.arange(0, LANES)
    given = ()
    for e in tl.static_range(len(values)):
        given = given + (tl.gather(values[e], (lane & (LANES - CHUNK)) + i, 0),)
    return given


@triton.jit
def sum_of_frames(frames, e):
    """Shares of a chunk's frames, (frames, EXTRA) -> the sum of each frame's, in its own lanes."""
    shares = ()
    for i in tl.static_range(len(frames)):
        shares = shares + (frames[i][e],)
    if len(frames) == 4:
        sum = halve(halve(shares, 2, 2, False), 1, 1, False)[0]
    else:
        sum = halve(shares, 1, 1, False)[0]
        sum += tl.gather(sum, tl.arange(0, LANES) ^ 2, 0)
    return sum


@triton.jit
def sum_over_frames(x, CHUNK: tl.constexpr):
    """A number of each of a chunk's frames, in its own lanes -> their sum."""
    lane = tl.arange(0, LANES)
    x += tl.gather(x, lane ^ 1, 0)
    if CHUNK == 4:
        x += tl.gather(x, lane ^ 2, 0)
    return x


@triton.jit
def none_of(EXTRA: tl.constexpr):
    """Zeros of each extra channel."""
    values = ()
    for _e in tl.static_range(EXTRA):
        values = values + (tl.zeros([LANES], tl.float32),)
    return values
