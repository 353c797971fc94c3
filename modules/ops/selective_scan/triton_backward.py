# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the selective scan's gradient; names and order as in `triton_kernels`.

The forward left the state before every SEGMENT frames. Segment by segment, last to first, the
program runs forward once to have the state before every CHUNK frames (in `scratch`, reused for
every segment, so that it stays in the cache), then takes the chunks last to first: each is run
forward once more, its states kept in registers, and then backward.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_kernels import (
    CHANNELS,
    load_frame,
    load_states,
    pair,
    parameter,
    place,
    position,
    silu_and_slope,
    step_size,
    store_states,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def halve(values, WIDTH: tl.constexpr, BIT: tl.constexpr, ORDERED: tl.constexpr):
    """2 WIDTH vectors -> WIDTH: a lane keeps its half of them, and adds its partner's share.

    The bit BIT of a lane's number says which half is its own; if they are ORDERED, it is the first.
    """
    lane = tl.arange(0, CHANNELS)
    upper = (lane & BIT) != 0
    half = ()
    for i in tl.static_range(WIDTH):
        if ORDERED:
            kept, given = values[i], values[i + WIDTH]
        else:
            kept = tl.where(upper, values[i + WIDTH], values[i])
            given = tl.where(upper, values[i], values[i + WIDTH])
        half = half + (kept + tl.gather(given, lane ^ BIT, 0),)
    return half


@triton.jit
def sum_over_channels(values, BITS: tl.constexpr):
    """16 vectors -> one: lanes 2 n and 2 n + 1 hold half of the n-th's sum each, in 15 shuffles.

    BITS: those in which the order of a lane's vectors follows its number.
    """
    values = halve(values, 8, 16, (BITS & 8) != 0)
    values = halve(values, 4, 8, (BITS & 4) != 0)
    values = halve(values, 2, 4, (BITS & 2) != 0)
    return halve(values, 1, 2, False)


@triton.jit
def advance(h, decay, dt_u, row, order, N: tl.constexpr, PACKED: tl.constexpr):
    """The states one frame on."""
    new = ()
    for n in tl.static_range(0, N, 2):
        B_even, B_odd = pair(row, 0, n, order, PACKED)
        new = new + (decay[n] * h[n] + dt_u * B_even,)
        if n + 1 < N:
            new = new + (decay[n + 1] * h[n + 1] + dt_u * B_odd,)
    return new


@triton.jit
def decays_of(step, A_n, N: tl.constexpr):
    decay = ()
    for n in tl.static_range(N):
        decay = decay + (tl.exp2(step * A_n[n]),)
    return decay


# One build for every number of frames and utterances.
@triton.jit(do_not_specialize=["frames", "piece_frames", "utterances", "reverse_from"])
def backward_kernel(
    u, dt, A, BC, D, z, dt_bias, lengths, starts, scratch, dy, dfinal,
    du, ddt, dz, dBC, dparameters, dinitial,
    frames, piece_frames, channels, utterances, reverse_from,
    u_g, u_b, u_t, dt_g, dt_b, dt_t, z_g, z_b, z_t, dy_g, dy_b, dy_t,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dparameters (pieces, N + 2, D), for A, D and dt_bias, is this piece's share, dBC (scans,
    blocks, T, 2 N) this block of channels'. The caller sums them, always in the same order.
    """
    piece, scan, group, b, begin, own_frames, length, reverse = place(
        lengths, frames, piece_frames, utterances, reverse_from
    )
    lane = tl.arange(0, CHANNELS)
    d = tl.program_id(0) * CHANNELS + lane
    d_mask = d < channels
    d_read = tl.minimum(d, channels - 1)

    # Place n has state n ^ order, another one in every lane: so sums over lanes want no choices.
    BITS: tl.constexpr = N - 2 if N == 16 or N == 8 or N == 4 else 0
    order = (lane >> 1) & BITS
    A_n = load_states(A + group * N * channels, channels, d_read, order, N)
    skip = parameter(D, group, channels, d_read)
    bias = parameter(dt_bias, group, channels, d_read)
    dD_sum = tl.zeros([CHANNELS], tl.float32)
    ddt_sum = tl.zeros([CHANNELS], tl.float32)
    none = tl.zeros([CHANNELS], tl.float32)
    dA_n = ()
    message = ()  # the gradient of the state after the frame at hand
    for n in tl.static_range(N):
        dA_n = dA_n + (none,)
        if dfinal is None:
            message = message + (none,)
        else:
            last = dfinal + (piece * N + (n ^ order)) * channels + d
            message = message + (tl.load(last, mask=d_mask, other=0.0),)

    u += group * u_g + b * u_b + begin * u_t + d_read
    dt += group * dt_g + b * dt_b + begin * dt_t + d_read
    dy += group * dy_g + b * dy_b + begin * dy_t + d_read
    BC += (scan * frames + begin) * (N if PACKED else 2 * N)
    du += (scan * frames + begin) * channels + d
    ddt += (scan * frames + begin) * channels + d
    if z is not None:
        z += group * z_g + b * z_b + begin * z_t + d_read
        dz += (scan * frames + begin) * channels + d
    blocks = tl.num_programs(0)
    dBC += ((scan * blocks + tl.program_id(0)) * frames + begin) * 2 * N
    dBC += (lane & 1) * N + (lane >> 1)  # the sum that a lane comes to hold
    in_row = (lane >> 1) < N
    scratch += (piece * blocks + tl.program_id(0)) * (SEGMENT // CHUNK - 1) * N * CHANNELS
    starts += piece * tl.cdiv(piece_frames, SEGMENT) * N * channels

    segments = tl.cdiv(length, SEGMENT)
    for s in range(0, segments):
        first = (segments - 1 - s) * SEGMENT
        chunks = tl.cdiv(tl.minimum(length - first, SEGMENT), CHUNK)

        # Forward to the last chunk.
        h = load_states(starts + (segments - 1 - s) * N * channels, channels, d_read, order, N)
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(first + i, length, reverse)
            rows = rows + (load_frame(u, dt, None, BC, t, u_t, dt_t, 0, N, PACKED),)
        for c in range(0, chunks - 1):
            store_states(scratch + c * N * CHANNELS, h, CHANNELS, lane, 0, lane >= 0, N)
            for i in tl.static_range(CHUNK):
                row_u, row_dt, _gate, row = rows[0]
                step, _slope = step_size(row_dt, bias, SOFTPLUS)
                decay = decays_of(step, A_n, N)
                h = advance(h, decay, step * row_u.to(tl.float32), row, order, N, PACKED)
                t = position(first + (c + 1) * CHUNK + i, length, reverse)
                rows = rows[1:] + (load_frame(u, dt, None, BC, t, u_t, dt_t, 0, N, PACKED),)

        # Backward from there.
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(first + (chunks - 1) * CHUNK + i, length, reverse)
            frame = load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, N, PACKED)
            rows = rows + (frame + (tl.load(dy + t * dy_t),),)
        start = h
        for j in range(0, chunks):
            c = chunks - 1 - j
            k = first + c * CHUNK
            states = (start,)  # before and after each frame
            decays = ()
            steps = ()
            slopes = ()
            for i in tl.static_range(CHUNK):
                step, slope = step_size(rows[i][1], bias, SOFTPLUS)
                step = tl.where(k + i < length, step, 0.0)
                dt_u = step * rows[i][0].to(tl.float32)
                decays = decays + (decays_of(step, A_n, N),)
                states = states + (
                    advance(states[i], decays[i], dt_u, rows[i][3], order, N, PACKED),
                )
                steps = steps + (step,)
                slopes = slopes + (slope,)

            ahead = ()
            for i in tl.static_range(CHUNK - 1, -1, -1):
                valid = k + i < length
                t = position(k + i, length, reverse)
                row = rows[i][3]
                u_k = rows[i][0].to(tl.float32)
                # A thread beyond the channels adds nothing to the sums over them.
                dy_k = tl.where(valid & d_mask, rows[i][4].to(tl.float32), 0.0)
                if z is not None:
                    silu, silu_slope = silu_and_slope(rows[i][2])
                    y_k = skip * u_k
                    for n in tl.static_range(0, N, 2):
                        C_even, C_odd = pair(row, N, n, order, PACKED)
                        y_k += states[i + 1][n] * C_even
                        if n + 1 < N:
                            y_k += states[i + 1][n + 1] * C_odd
                    dz_k = (dy_k * y_k * silu_slope).to(dz.dtype.element_ty)
                    tl.store(dz + t * channels, dz_k, mask=d_mask & valid)
                    dy_k *= silu

                dt_u = steps[i] * u_k
                ddt_u = none
                dlog_A = none
                dB = ()
                dC = ()
                new = ()
                new_dA = ()
                for n in tl.static_range(N):
                    if n % 2 == 0:
                        B_k, B_next = pair(row, 0, n, order, PACKED)
                        C_k, C_next = pair(row, N, n, order, PACKED)
                    else:
                        B_k, C_k = B_next, C_next
                    dh = message[n] + dy_k * C_k
                    before = decays[i][n] * dh
                    dlog = before * states[i][n]  # of dt A
                    new = new + (before,)
                    new_dA = new_dA + (dA_n[n] + dlog * steps[i],)
                    ddt_u += dh * B_k
                    dlog_A += dlog * A_n[n]
                    dB = dB + (dh * dt_u,)
                    dC = dC + (states[i + 1][n] * dy_k,)
                message = new
                dA_n = new_dA
                for _n in tl.static_range(16 - N):
                    dB = dB + (none,)
                    dC = dC + (none,)
                shares = sum_over_channels(dB, BITS) + sum_over_channels(dC, BITS)
                tl.store(dBC + t * 2 * N, halve(shares, 1, 1, False)[0], mask=valid & in_row)

                # A is log2(e) times itself; ln(2) takes that back.
                ddt_k = tl.where(valid, (dlog_A * LN2 + ddt_u * u_k) * slopes[i], 0.0)
                ddt_sum += ddt_k
                dD_sum += dy_k * u_k
                du_k = ddt_u * steps[i] + dy_k * skip
                tl.store(du + t * channels, du_k.to(du.dtype.element_ty), mask=d_mask & valid)
                tl.store(ddt + t * channels, ddt_k.to(ddt.dtype.element_ty), mask=d_mask & valid)

                # Early, while the registers are free that the last frame had, and all at once: a
                # wait for one load is a wait for those asked for after it, too.
                if i == CHUNK - 1:
                    for m in tl.static_range(CHUNK):
                        t = position(k - CHUNK + m, length, reverse)
                        frame = load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, N, PACKED)
                        ahead = ahead + (frame + (tl.load(dy + t * dy_t),),)
                if i == CHUNK - 2:
                    at = scratch + tl.maximum(c - 1, 0) * N * CHANNELS
                    start = load_states(at, CHANNELS, lane, 0, N)
            rows = ahead

    for t in range(length, own_frames):
        tl.store(du + t * channels, none.to(du.dtype.element_ty), mask=d_mask)
        tl.store(ddt + t * channels, none.to(ddt.dtype.element_ty), mask=d_mask)
        if z is not None:
            tl.store(dz + t * channels, none.to(dz.dtype.element_ty), mask=d_mask)
        tl.store(dBC + t * 2 * N, none, mask=in_row)
    dparameters += piece * (N + 2) * channels
    store_states(dparameters, dA_n, channels, d, order, d_mask, N)
    store_states(dparameters + N * channels, (dD_sum, ddt_sum), channels, d, 0, d_mask, 2)
    if dinitial is not None:
        store_states(dinitial + piece * N * channels, message, channels, d, order, d_mask, N)
