# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the selective scan's gradient; names and order as in `triton_kernels`.

The forward left the state before every SEGMENT frames. Segment by segment, last to first, the
program runs forward once to have the state before every CHUNK frames (in `scratch`, reused for
every segment, so that it stays in the cache), then takes the chunks last to first: each is run
forward once more, its states kept in registers, and then backward.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_ahead import prefetch_frames, prefetch_states
from modules.ops.selective_scan.triton_extra import (
    extra_channels,
    extra_gradients,
    extra_parameters,
    extra_steps,
    load_extra,
    load_extra_dy,
    none_of,
    of_frame,
    store_zeros,
    sum_of_frames,
    sum_over_frames,
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
    fetch,
    keep,
    load_states,
    numbers,
    of_four,
    per_lane,
    place_in_row,
    store_states,
    sum_of_four,
    sum_over_groups,
    turned,
    zeros,
)

LN2 = tl.constexpr(0.6931471805599453)


# One build for every number of frames and utterances.
@triton.jit(do_not_specialize=["frames", "piece_frames", "utterances", "reverse_from"])
def backward_kernel(
    u, dt, A, BC, D, z, dt_bias, lengths, starts, scratch, dy, dfinal,
    du, ddt, dz, dBC, dparameters, dinitial,
    frames, piece_frames, channels, utterances, reverse_from, words,
    u_g, u_b, u_t, dt_g, dt_b, dt_t, z_g, z_b, z_t, dy_g, dy_b, dy_t,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dparameters (pieces, N + 2, D), for A, D and dt_bias, is this piece's share, dBC (scans,
    blocks, T, 2 N) this block of channels'. The caller sums them, always in the same order.
    """
    piece, scan, group, b, begin, own_frames, length, origin, sign = place(
        lengths, frames, piece_frames, utterances, reverse_from
    )
    PER: tl.constexpr = per_lane(N)
    KEPT: tl.constexpr = (4 + EXTRA) * PER * LANES
    block = tl.program_id(0)
    d = channel(block, 0, EXTRA)
    d_mask = d < channels
    d_read = tl.minimum(d, channels - 1)
    A_n = load_states(A + group * N * channels, channels, block, EXTRA, N)
    skip = parameter(D, group, channels, d_read)
    bias = bias_of(dt_bias, group, channels, d)
    extra, extra_out, there = extra_channels(block, channels, d, EXTRA)
    extra_skip, extra_bias = extra_parameters(D, dt_bias, group, channels, block, EXTRA)
    own = tl.arange(0, LANES) % CHUNK  # the lane's frame of a chunk, for extra channels
    none = tl.zeros([LANES], tl.float32)
    extra_dD = none_of(EXTRA)
    extra_dbias = none_of(EXTRA)
    dD_sum = none
    ddt_sum = none
    dA_n = zeros(EXTRA, N)
    # The gradient of the state after the frame at hand.
    if dfinal is None:
        message = zeros(EXTRA, N)
    else:
        message = load_states(dfinal + piece * N * channels, channels, block, EXTRA, N)

    u += group * u_g + b * u_b + begin * u_t + d_read
    dt += group * dt_g + b * dt_b + begin * dt_t + d_read
    dy += group * dy_g + b * dy_b + begin * dy_t + d_read
    BC += (scan * frames + begin) * words
    du += (scan * frames + begin) * channels + d
    ddt += (scan * frames + begin) * channels + d
    if z is not None:
        z += group * z_g + b * z_b + begin * z_t + d_read
        dz += (scan * frames + begin) * channels + d
    blocks = tl.num_programs(0)
    in_row, is_in_row = place_in_row(N)
    dBC += ((scan * blocks + block) * frames + begin) * 2 * N + in_row
    scratch += (piece * blocks + block) * (SEGMENT // CHUNK - 1) * KEPT
    starts += (piece * tl.cdiv(piece_frames, SEGMENT) * blocks + block) * KEPT

    tl.static_assert(SEGMENT == LANES)  # a lane asks for a frame of the next segment

    segments = tl.cdiv(length, SEGMENT)
    for s in range(0, segments):
        first = (segments - 1 - s) * SEGMENT
        chunks = tl.cdiv(tl.minimum(length - first, SEGMENT), CHUNK)
        if EXTRA > 0:  # two warps a scheduler hide each other's waits, and the requests cost time
            next = position(first - SEGMENT + tl.arange(0, LANES), length, origin, sign)
            prefetch_states(starts + tl.maximum(segments - 2 - s, 0) * blocks * KEPT, KEPT)
            prefetch_frames(
                u, dt, z, dy, BC, next, u_t, dt_t, z_t, dy_t, words, block, d_read, channels,
                N, PACKED, EXTRA,
            )  # fmt: skip

        # Forward to the last chunk.
        h = fetch(starts + (segments - 1 - s) * blocks * KEPT, EXTRA, N)
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(first + i, length, origin, sign)
            rows = rows + (load_frame(u, dt, None, BC, t, u_t, dt_t, 0, words, N, PACKED),)
        t_own = position(first + own, length, origin, sign)
        extra_rows = load_extra(u, dt, None, extra, t_own, u_t, dt_t, 0)
        for c in range(0, chunks - 1):
            keep(scratch + c * KEPT, h)
            extra_step, _slopes, extra_dt_u = extra_steps(extra_rows, extra_bias, True, SOFTPLUS)
            t_own = position(first + (c + 1) * CHUNK + own, length, origin, sign)
            extra_rows = load_extra(u, dt, None, extra, t_own, u_t, dt_t, 0)
            for i in tl.static_range(CHUNK):
                row_u, row_dt, _gate, row = rows[0]
                step, _slope = step_size(row_dt, bias, True, SOFTPLUS)
                dt_u = of_four(step * row_u.to(tl.float32)) + of_frame(extra_dt_u, i, CHUNK)
                decays = decays_of(of_four(step) + of_frame(extra_step, i, CHUNK), A_n, N)
                h = advance(h, decays, dt_u, numbers(turned(row, PACKED), 0, N, PACKED), N)
                t = position(first + (c + 1) * CHUNK + i, length, origin, sign)
                rows = rows[1:] + (load_frame(u, dt, None, BC, t, u_t, dt_t, 0, words, N, PACKED),)

        # Backward from there.
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(first + (chunks - 1) * CHUNK + i, length, origin, sign)
            frame = load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N, PACKED)
            rows = rows + (frame + (tl.load(at(dy, t, dy_t)),),)
        t_own = position(first + (chunks - 1) * CHUNK + own, length, origin, sign)
        extra_rows = load_extra(u, dt, z, extra, t_own, u_t, dt_t, z_t)
        extra_dy = load_extra_dy(dy, extra, t_own, dy_t)
        start = h
        for j in range(0, chunks):
            c = chunks - 1 - j
            k = first + c * CHUNK
            states = (start,)  # before and after each frame
            decays = ()
            steps = ()
            slopes = ()
            own_valid = k + own < length
            extra_step, extra_slope, extra_dt_u = extra_steps(
                extra_rows, extra_bias, own_valid, SOFTPLUS
            )
            for i in tl.static_range(CHUNK):
                step, slope = step_size(rows[i][1], bias, k + i < length, SOFTPLUS)
                dt_u = of_four(step * rows[i][0].to(tl.float32)) + of_frame(extra_dt_u, i, CHUNK)
                B = numbers(turned(rows[i][3], PACKED), 0, N, PACKED)
                steps = steps + (of_four(step) + of_frame(extra_step, i, CHUNK),)
                slopes = slopes + (slope,)
                decays = decays + (decays_of(steps[i], A_n, N),)
                states = states + (advance(states[i], decays[i], dt_u, B, N),)

            extra_dy_k, extra_dz = extra_gradients(extra_rows, extra_dy, z, own_valid)
            extra_y = ()
            extra_ddt_u = ()
            extra_dlog_A = ()
            ahead = ()
            for i in tl.static_range(CHUNK - 1, -1, -1):
                # What is beyond the length writes to the last frame, which then writes its own.
                t = position(k + i, length, origin, sign)
                row = turned(rows[i][3], PACKED)
                B = numbers(row, 0, N, PACKED)
                C = numbers(row, N, N, PACKED)
                u_k = rows[i][0].to(tl.float32)
                dy_k = tl.where(k + i < length, rows[i][4].to(tl.float32), 0.0)
                if z is not None:
                    silu, silu_slope = silu_and_slope(rows[i][2])
                    shares = read_out(states[i + 1], C, N)
                    extra_y = (shares[4:],) + extra_y
                    y_k = skip * u_k + sum_of_four(shares)
                    dz_k = (dy_k * y_k * silu_slope).to(dz.dtype.element_ty)
                    tl.store(at(dz, t, channels), dz_k, mask=d_mask)
                    dy_k *= silu

                step = steps[i]
                dt_u = of_four(step[0] * u_k) + of_frame(extra_dt_u, i, CHUNK)
                dy_four = of_four(dy_k) + of_frame(extra_dy_k, i, CHUNK)
                ddt_u = ()
                dlog_A = ()
                dB = ()
                dC = ()
                for _n in tl.static_range(PER):
                    dB = dB + (none,)
                    dC = dC + (none,)
                new = ()
                new_dA = ()
                for m in tl.static_range(4 + EXTRA):
                    to_dt_u = none
                    to_dlog_A = none
                    new_dB = ()
                    new_dC = ()
                    for n in tl.static_range(PER):
                        dh = message[m * PER + n] + dy_four[m] * C[n]
                        before = decays[i][m * PER + n] * dh
                        dlog = before * states[i][m * PER + n]  # of dt A
                        new = new + (before,)
                        new_dA = new_dA + (dA_n[m * PER + n] + dlog * step[m],)
                        to_dt_u += dh * B[n]
                        to_dlog_A += dlog * A_n[m * PER + n]
                        new_dB = new_dB + (dB[n] + dh * dt_u[m],)
                        new_dC = new_dC + (dC[n] + states[i + 1][m * PER + n] * dy_four[m],)
                    ddt_u = ddt_u + (to_dt_u,)
                    dlog_A = dlog_A + (to_dlog_A,)
                    dB = new_dB
                    dC = new_dC
                message = new
                dA_n = new_dA
                dBC_k = sum_over_groups(dB, dC, N)
                tl.store(at(dBC, t, 2 * N), dBC_k, mask=is_in_row)

                extra_ddt_u = (ddt_u[4:],) + extra_ddt_u
                extra_dlog_A = (dlog_A[4:],) + extra_dlog_A
                # A is log2(e) times itself; ln(2) takes that back.
                ddt_u_k = sum_of_four(ddt_u)
                ddt_k = (sum_of_four(dlog_A) * LN2 + ddt_u_k * u_k) * slopes[i]
                ddt_sum += ddt_k
                dD_sum += dy_k * u_k
                du_k = ddt_u_k * step[0] + dy_k * skip
                tl.store(at(du, t, channels), du_k.to(du.dtype.element_ty), mask=d_mask)
                tl.store(at(ddt, t, channels), ddt_k.to(ddt.dtype.element_ty), mask=d_mask)

                # Early, while the registers are free that the last frame had, and all at once: a
                # wait for one load is a wait for those asked for after it, too.
                if i == CHUNK - 1:
                    for m in tl.static_range(CHUNK):
                        t = position(k - CHUNK + m, length, origin, sign)
                        frame = load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N, PACKED)
                        ahead = ahead + (frame + (tl.load(at(dy, t, dy_t)),),)
                    t_own = position(k - CHUNK + own, length, origin, sign)
                    extra_ahead = load_extra(u, dt, z, extra, t_own, u_t, dt_t, z_t)
                    extra_dy_ahead = load_extra_dy(dy, extra, t_own, dy_t)
                if i == (CHUNK - 2 if CHUNK > 2 else CHUNK - 1):
                    start = fetch(scratch + tl.maximum(c - 1, 0) * KEPT, EXTRA, N)
            new_dD = ()
            new_dbias = ()
            for e in tl.static_range(EXTRA):
                u_k = extra_rows[e][0].to(tl.float32)
                dlog = sum_of_frames(extra_dlog_A, e) * LN2
                ddt_u_k = sum_of_frames(extra_ddt_u, e)
                ddt_k = (dlog + ddt_u_k * u_k) * extra_slope[e]
                du_k = ddt_u_k * extra_step[e] + extra_dy_k[e] * extra_skip[e]
                new_dD = new_dD + (extra_dD[e] + extra_dy_k[e] * u_k,)
                new_dbias = new_dbias + (extra_dbias[e] + ddt_k,)
                t_own = position(k + own, length, origin, sign)
                valid = there[e] & own_valid
                du_k = du_k.to(du.dtype.element_ty)
                ddt_k = ddt_k.to(ddt.dtype.element_ty)
                tl.store(at(du + extra_out[e], t_own, channels), du_k, mask=valid)
                tl.store(at(ddt + extra_out[e], t_own, channels), ddt_k, mask=valid)
                if z is not None:
                    y_k = extra_skip[e] * u_k + sum_of_frames(extra_y, e)
                    dz_k = (extra_dz[e] * y_k).to(dz.dtype.element_ty)
                    tl.store(at(dz + extra_out[e], t_own, channels), dz_k, mask=valid)
            extra_dD = new_dD
            extra_dbias = new_dbias
            rows = ahead
            extra_rows = extra_ahead
            extra_dy = extra_dy_ahead

    for t in range(length, own_frames):
        tl.store(du + t * channels, none.to(du.dtype.element_ty), mask=d_mask)
        store_zeros(du + t * channels, extra_out, there)
        tl.store(ddt + t * channels, none.to(ddt.dtype.element_ty), mask=d_mask)
        store_zeros(ddt + t * channels, extra_out, there)
        if z is not None:
            tl.store(dz + t * channels, none.to(dz.dtype.element_ty), mask=d_mask)
            store_zeros(dz + t * channels, extra_out, there)
        tl.store(dBC + t * 2 * N, none, mask=is_in_row)
    dparameters += piece * (N + 2) * channels
    store_states(dparameters, dA_n, channels, block, EXTRA, N)
    dparameters += N * channels + d
    tl.store(dparameters, dD_sum, mask=d_mask)
    tl.store(dparameters + channels, ddt_sum, mask=d_mask)
    for e in tl.static_range(EXTRA):
        to = dparameters + extra_out[e]
        tl.store(to, sum_over_frames(extra_dD[e], CHUNK), mask=there[e])
        tl.store(to + channels, sum_over_frames(extra_dbias[e], CHUNK), mask=there[e])
    if dinitial is not None:
        store_states(dinitial + piece * N * channels, message, channels, block, EXTRA, N)
