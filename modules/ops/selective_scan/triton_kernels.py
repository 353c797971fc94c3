# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""The selective scan's forward, a Triton kernel, and what names mean in all of them.

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

from modules.ops.selective_scan.triton_ahead import prefetch_frames
from modules.ops.selective_scan.triton_extra import (
    extra_channels,
    extra_parameters,
    extra_steps,
    load_extra,
    of_frame,
    store_zeros,
    sum_of_frames,
)
from modules.ops.selective_scan.triton_frames import (
    advance,
    at,
    bias_of,
    decays_of,
    load_frame,
    parameter,
    place,
    position,
    read_out,
    silu_and_slope,
    step_size,
)
from modules.ops.selective_scan.triton_layout import (
    LANES,
    channel,
    keep,
    load_states,
    numbers,
    of_four,
    per_lane,
    store_states,
    sum_of_four,
    turned,
    zeros,
)


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

    If wanted, y gets the result, starts (pieces, segments, blocks, (4 + EXTRA) PER, 32) the state
    before every SEGMENT frames as threads have it, total (pieces, D) the sum of the steps.
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
    extra, extra_out, there = extra_channels(block, channels, d, EXTRA)
    extra_skip, extra_bias = extra_parameters(D, dt_bias, group, channels, block, EXTRA)
    own = tl.arange(0, LANES) % CHUNK  # the lane's frame of a chunk, for extra channels
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
        y += (scan * frames + first) * channels + d
    if starts is not None:
        starts += (piece * tl.cdiv(piece_frames, SEGMENT) * tl.num_programs(0) + block) * KEPT
    steps = tl.zeros([LANES], tl.float32)
    tl.static_assert(SEGMENT == LANES)  # a lane asks for a frame of the next segment

    if length > 0:
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(i, length, origin, sign)
            rows = rows + (load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N, PACKED),)
        t_own = position(own, length, origin, sign)
        extra_rows = load_extra(u, dt, z, extra, t_own, u_t, dt_t, z_t)
        for k in range(0, length, CHUNK):
            ahead = ()
            for i in tl.static_range(CHUNK):
                t = position(k + CHUNK + i, length, origin, sign)
                ahead = ahead + (load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N, PACKED),)
            t_own = position(k + CHUNK + own, length, origin, sign)
            extra_ahead = load_extra(u, dt, z, extra, t_own, u_t, dt_t, z_t)
            # A branch, for the assembler moves nothing across it: what follows shares no scoreboard
            # with these loads, and waits for none of them.
            if k % SEGMENT == 0:
                if starts is not None:
                    keep(starts, h)
                    starts += tl.num_programs(0) * KEPT
                if starts is None or EXTRA > 0:
                    next = position(k + SEGMENT + tl.arange(0, LANES), length, origin, sign)
                    prefetch_frames(
                        u, dt, z, None, BC, next, u_t, dt_t, z_t, 0, words, block, d_read, channels,
                        N, PACKED, EXTRA,
                    )  # fmt: skip
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
                    y_k = sum_of_frames(extra_y, e)
                    y_k += extra_skip[e] * extra_rows[e][0].to(tl.float32)
                    if z is not None:
                        silu, _slope = silu_and_slope(extra_rows[e][2])
                        y_k *= silu
                    t_own = position(k + own, length, origin, sign)
                    y_k = y_k.to(y.dtype.element_ty)
                    tl.store(at(y + extra_out[e], t_own, channels), y_k, mask=there[e] & own_valid)
            rows = ahead
            extra_rows = extra_ahead

    if y is not None:
        zero = tl.zeros([LANES], y.dtype.element_ty)
        for t in range(length, own_frames):
            tl.store(y + t * channels, zero, mask=d_mask)
            store_zeros(y + t * channels, extra_out, there)
    if total is not None:
        tl.store(total + piece * channels + d, steps, mask=d_mask)
    store_states(final + piece * N * channels, h, channels, block, EXTRA, N)
