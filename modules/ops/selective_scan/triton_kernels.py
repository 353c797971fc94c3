# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the selective scan: what both share, and the forward.

A program is one warp, which walks along time to the utterance's own length and keeps the states of
its channels in registers in float32; `triton_layout` says which thread has which. Nothing is kept
in shared memory, so there is nothing to wait for but the loads, and those of the next CHUNK frames
are on their way while the current ones are computed.

One launch serves one direction or both: scans are numbered group by group, a group has a set of
parameters and `utterances` scans, and from scan `reverse_from` on time runs from an utterance's
last frame to its first. A scan of many frames may be cut into pieces, a program each; without
pieces, piece_frames is the number of frames.

d numbers channels, n states, k frames in the order of the scan, t frames in time. A comes
multiplied by log2(e), so that exp(dt A) is one exp2.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_layout import (
    LANES,
    channel,
    keep,
    load_row,
    load_states,
    numbers,
    of_four,
    of_frame,
    per_lane,
    store_states,
    sum_of_four,
    sum_of_frames,
    turned,
    zeros,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 within 4e-7 of its value."""
    # Least relative error of a polynomial; a quotient would take as many instructions again.
    p = -0.0085392026
    p = p * x + 0.044089619
    p = p * x - 0.10768171
    p = p * x + 0.17745242
    p = p * x - 0.24495463
    p = p * x + 0.33275479
    p = p * x - 0.49997404
    p = p * x + 0.99999982
    return x * p


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1; a division would ask first whether x is a large one."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def step_size(dt, bias, valid, SOFTPLUS: tl.constexpr):
    """dt as projected -> the step, its derivative.

    Both are zero if the frame is not valid or, by a bias of -inf, there is no such channel.
    """
    x = dt.to(tl.float32) + bias
    if SOFTPLUS:
        x = tl.where(valid, x, float("-inf"))
        e = tl.exp2(-tl.abs(x) * LOG2E)
        slope = tl.where(x >= 0, 1.0, e) * reciprocal(1.0 + e)
        x = tl.maximum(x, 0.0) + log1p(e)
    else:
        valid = valid & (bias > float("-inf"))
        x = tl.where(valid, x, 0.0)
        slope = tl.where(valid, 1.0, 0.0)
    return x, slope


@triton.jit
def silu_and_slope(z):
    """silu(z), its derivative."""
    z = z.to(tl.float32)
    sigmoid = reciprocal(1.0 + tl.exp2(-z * LOG2E))
    silu = z * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def position(k, length, start, sign):
    """The k-th frame of the scan, in time; the nearest valid one's if there is no such frame."""
    return start + sign * tl.maximum(tl.minimum(k, length - 1), 0)


@triton.jit
def at(p, t, stride):
    """p + t stride; in bytes and without signs, as then it takes one instruction."""
    element: tl.constexpr = p.dtype.element_ty
    size: tl.constexpr = element.primitive_bitwidth // 8
    bytes = tl.cast(tl.cast(stride * size, tl.uint32), tl.uint64) * t.to(tl.uint32).to(tl.uint64)
    return (p.to(tl.pointer_type(tl.int8)) + bytes).to(tl.pointer_type(element))


@triton.jit
def place(lengths, frames, piece_frames, utterances, reverse_from):
    """What the program scans.

    -> piece (over all scans), scan, its group, its utterance, the piece's first frame, its frames,
    how many of them are valid, that with which the scan begins, 1 or -1 if time runs backwards
    """
    piece = tl.program_id(1)
    pieces = tl.cdiv(frames, piece_frames)
    scan = piece // pieces
    first = (piece % pieces) * piece_frames
    group = scan // utterances
    b = scan % utterances
    length = frames
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + b), frames).to(tl.int32)
    frames = tl.minimum(frames - first, piece_frames)
    length = tl.minimum(tl.maximum(length - first, 0), frames)
    # The first frame of the scan, and the step to the next.
    reverse = (scan >= reverse_from).to(tl.int32)
    start, sign = reverse * (length - 1), 1 - 2 * reverse
    return (
        piece.to(tl.int64), scan.to(tl.int64), group.to(tl.int64), b.to(tl.int64),
        first.to(tl.int64), frames, length, start, sign,
    )  # fmt: skip


@triton.jit
def parameter(p, group, channels, d):
    """A parameter (groups, D) at channels d in float32; zero if there is none."""
    if p is None:
        x = tl.zeros([LANES], tl.float32)
    else:
        x = tl.load(p + group * channels + d).to(tl.float32)
    return x


@triton.jit
def bias_of(dt_bias, group, channels, d):
    """As `parameter`; -inf at channels that there are not, whose step is zero then."""
    bias = parameter(dt_bias, group, channels, tl.minimum(d, channels - 1))
    return tl.where(d < channels, bias, float("-inf"))


@triton.jit
def load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N: tl.constexpr, PACKED: tl.constexpr):
    """-> u, dt and z (0 if there is none) of frame t, its row of B and C"""
    gate = 0.0 if z is None else tl.load(at(z, t, z_t))
    row = load_row(at(BC, t, words), N, PACKED)
    return tl.load(at(u, t, u_t)), tl.load(at(dt, t, dt_t)), gate, row


@triton.jit
def extra_channels(block, channels, d_read, EXTRA: tl.constexpr):
    """-> a group's extra channels as offsets from d_read that can be read, whether they exist"""
    offsets = ()
    there = ()
    for e in tl.static_range(EXTRA):
        d = channel(block, 4 + e, EXTRA)
        offsets = offsets + (tl.minimum(d, channels - 1) - d_read,)
        there = there + (d < channels,)
    return offsets, there


@triton.jit
def extra_parameters(D, dt_bias, group, channels, block, EXTRA: tl.constexpr):
    """-> `parameter` D, `bias_of` extra channels"""
    skips = ()
    biases = ()
    for e in tl.static_range(EXTRA):
        d = channel(block, 4 + e, EXTRA)
        skips = skips + (parameter(D, group, channels, tl.minimum(d, channels - 1)),)
        biases = biases + (bias_of(dt_bias, group, channels, d),)
    return skips, biases


@triton.jit
def load_extra(u, dt, z, offsets, t, u_t, dt_t, z_t):
    """-> (u, dt and z (0 if there is none)) of each extra channel, at a lane's frame t"""
    rows = ()
    for e in tl.static_range(len(offsets)):
        gate = 0.0 if z is None else tl.load(at(z + offsets[e], t, z_t))
        u_e = tl.load(at(u + offsets[e], t, u_t))
        rows = rows + ((u_e, tl.load(at(dt + offsets[e], t, dt_t)), gate),)
    return rows


@triton.jit
def load_extra_dy(dy, offsets, t, dy_t):
    rows = ()
    for e in tl.static_range(len(offsets)):
        rows = rows + (tl.load(at(dy + offsets[e], t, dy_t)),)
    return rows


@triton.jit
def extra_steps(rows, biases, valid, SOFTPLUS: tl.constexpr):
    """-> the steps of extra channels, their slopes, dt u"""
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
def decays_of(steps, A, N: tl.constexpr):
    PER: tl.constexpr = per_lane(N)
    decays = ()
    for i in tl.static_range(len(steps)):
        for n in tl.static_range(PER):
            decays = decays + (tl.exp2(steps[i] * A[i * PER + n]),)
    return decays


@triton.jit
def advance(h, decays, dt_u, B, N: tl.constexpr):
    """The states one frame on."""
    PER: tl.constexpr = per_lane(N)
    new = ()
    for i in tl.static_range(len(dt_u)):
        for n in tl.static_range(PER):
            new = new + (decays[i * PER + n] * h[i * PER + n] + dt_u[i] * B[n],)
    return new


@triton.jit
def read_out(h, C, N: tl.constexpr):
    """C h of a frame: a lane's share for each of its channels."""
    PER: tl.constexpr = per_lane(N)
    y = ()
    for i in tl.static_range(len(h) // PER):
        share = h[i * PER] * C[0]
        for n in tl.static_range(1, PER):
            share += h[i * PER + n] * C[n]
        y = y + (share,)
    return y


# One build for every number of frames and utterances.
@triton.jit(do_not_specialize=["frames", "piece_frames", "utterances", "reverse_from"])
def forward_kernel(
    u, dt, A, BC, D, z, dt_bias, lengths, initial,
    y, final, starts, total,
    frames, piece_frames, channels, utterances, reverse_from, words,
    u_g, u_b, u_t, dt_g, dt_b, dt_t, z_g, z_b, z_t,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """final (pieces, N, D) gets the state after the last frame.

    If wanted, y gets the result, starts (pieces, segments, blocks, (4 + EXTRA) PER, 32) the state before
    every SEGMENT frames as threads have it, total (pieces, D) the sum of the steps.
    """
    piece, scan, group, b, first, own_frames, length, origin, sign = place(
        lengths, frames, piece_frames, utterances, reverse_from
    )
    KEPT: tl.constexpr = (4 + EXTRA) * per_lane(N) * LANES
    block = tl.program_id(0)
    d = channel(block, 0, EXTRA)
    d_mask = d < channels
    d_read = tl.minimum(d, channels - 1)  # loads without a mask; what it says too much, none stores

    A_n = load_states(A + group * N * channels, channels, block, EXTRA, N)
    skip = parameter(D, group, channels, d_read)
    bias = bias_of(dt_bias, group, channels, d)
    extra, there = extra_channels(block, channels, d_read, EXTRA)
    extra_skip, extra_bias = extra_parameters(D, dt_bias, group, channels, block, EXTRA)
    own = tl.arange(0, LANES) & (CHUNK - 1)  # a lane's frame of a chunk, for extra channels
    if initial is None:
        h = zeros(EXTRA, N)
    else:
        h = load_states(initial + piece * N * channels, channels, block, EXTRA, N)
    u += group * u_g + b * u_b + first * u_t + d_read
    dt += group * dt_g + b * dt_b + first * dt_t + d_read
    if z is not None:
        z += group * z_g + b * z_b + first * z_t + d_read
    BC += (scan * frames + first) * words
    if y is not None:
        y += (scan * frames + first) * channels + d_read
    if starts is not None:
        starts += (piece * tl.cdiv(piece_frames, SEGMENT) * tl.num_programs(0) + block) * KEPT
    steps = tl.zeros([LANES], tl.float32)

    if length > 0:
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(i, length, origin, sign)
            rows = rows + (load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N, PACKED),)
        t_own = position(own, length, origin, sign)
        extra_rows = load_extra(u, dt, z, extra, t_own, u_t, dt_t, z_t)
        for k in range(0, length, CHUNK):
            if starts is not None:  # noqa: SIM102 - one is known when compiling
                if k % SEGMENT == 0:
                    keep(starts, h)
                    starts += tl.num_programs(0) * KEPT
            # All at once: a wait for one load is a wait for those asked for after it, too.
            ahead = ()
            for i in tl.static_range(CHUNK):
                t = position(k + CHUNK + i, length, origin, sign)
                ahead = ahead + (load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N, PACKED),)
            t_own = position(k + CHUNK + own, length, origin, sign)
            extra_ahead = load_extra(u, dt, z, extra, t_own, u_t, dt_t, z_t)
            own_valid = k + own < length
            extra_step, _slopes, extra_dt_u = extra_steps(
                extra_rows, extra_bias, own_valid, SOFTPLUS
            )
            extra_y = ()
            for i in tl.static_range(CHUNK):
                row_u, row_dt, gate, row = rows[i]
                row = turned(row, PACKED)
                u_k = row_u.to(tl.float32)
                step, _slope = step_size(row_dt, bias, k + i < length, SOFTPLUS)
                steps += step
                decays = decays_of(of_four(step) + of_frame(extra_step, i, CHUNK), A_n, N)
                dt_u = of_four(step * u_k) + of_frame(extra_dt_u, i, CHUNK)
                h = advance(h, decays, dt_u, numbers(row, 0, N, PACKED), N)
                if y is not None:
                    shares = read_out(h, numbers(row, N, N, PACKED), N)
                    extra_y = extra_y + (shares[4:],)
                    y_k = skip * u_k + sum_of_four(shares)
                    if z is not None:
                        silu, _slope = silu_and_slope(gate)
                        y_k *= silu
                    t = position(k + i, length, origin, sign)
                    valid = d_mask & (k + i < length)
                    tl.store(at(y, t, channels), y_k.to(y.dtype.element_ty), mask=valid)
            if y is not None:
                for e in tl.static_range(EXTRA):
                    shares = (extra_y[0][e], extra_y[1][e], extra_y[2][e], extra_y[3][e])
                    y_k = extra_skip[e] * extra_rows[e][0].to(tl.float32) + sum_of_frames(shares)
                    if z is not None:
                        silu, _slope = silu_and_slope(extra_rows[e][2])
                        y_k *= silu
                    t_own = position(k + own, length, origin, sign)
                    valid = there[e] & own_valid
                    tl.store(
                        at(y + extra[e], t_own, channels), y_k.to(y.dtype.element_ty), mask=valid
                    )
            rows = ahead
            extra_rows = extra_ahead

    if y is not None:
        zero = tl.zeros([LANES], y.dtype.element_ty)
        for t in range(length, own_frames):
            tl.store(y + t * channels, zero, mask=d_mask)
            for e in tl.static_range(EXTRA):
                tl.store(y + extra[e] + t * channels, zero, mask=there[e])
    if total is not None:
        tl.store(total + piece * channels + d, steps, mask=d_mask)
    store_states(final + piece * N * channels, h, channels, block, EXTRA, N)
