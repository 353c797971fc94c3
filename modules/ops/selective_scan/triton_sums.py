# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels that put together what the selective scan's programs leave: shares and pieces.

A scan in pieces takes two passes. The first gives every piece its final state from a zero state,
and its steps' sum; as the states' recurrence is linear, `chain_kernel` then finds where each piece
starts: h <- exp(A sum of steps) h + its final state. The gradient runs through the pieces the same
way, from the last to the first. The second pass scans every piece from its start.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_kernels import (
    CHANNELS,
    load_row,
    load_states,
    pair,
    parameter,
    place,
    position,
    silu_and_slope,
    step_size,
    store_states,
)


@triton.jit(do_not_specialize=["blocks", "numbers"])
def sum_blocks_kernel(shares, dB, dC, blocks, numbers, N: tl.constexpr, TILE: tl.constexpr):
    """shares (scans, blocks, T, 2 N) -> dB, dC (scans, T, N), block after block; numbers: T 2 N."""
    scan = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    shares += scan * blocks * numbers + i
    sum = tl.zeros([TILE], tl.float32)
    for _ in range(0, blocks):
        sum += tl.load(shares, mask=i < numbers, other=0.0)
        shares += numbers
    n = i % (2 * N)
    to = scan * (numbers // 2) + (i // (2 * N)) * N + n % N
    tl.store(dB + to, sum.to(dB.dtype.element_ty), mask=(i < numbers) & (n < N))
    tl.store(dC + to, sum.to(dC.dtype.element_ty), mask=(i < numbers) & (n >= N))


@triton.jit(do_not_specialize=["numbers", "channels", "pieces", "scans_a_group", "reverse_from"])
def chain_kernel(
    local, total, A, initial, starts, last,
    numbers, channels, pieces, scans_a_group, reverse_from, BACKWARDS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """local (scans, pieces, N, D), total (scans, pieces, D), A (groups, N, D), initial
    (scans, N, D) or None -> starts, as local, and last, as initial.

    BACKWARDS: against the order of the scan. numbers is N D.
    """
    scan = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = i < numbers
    A_i = tl.load(A + (scan // scans_a_group) * numbers + i, mask=mask, other=0.0)
    h = tl.zeros([TILE], tl.float32)
    if initial is not None:
        h = tl.load(initial + scan * numbers + i, mask=mask, other=0.0)
    descending = (scan >= reverse_from) != BACKWARDS
    for k in range(0, pieces):
        piece = scan * pieces + tl.where(descending, pieces - 1 - k, k)
        tl.store(starts + piece * numbers + i, h, mask=mask)
        step = tl.load(total + piece * channels + i % channels, mask=mask, other=0.0)
        end = tl.load(local + piece * numbers + i, mask=mask, other=0.0)
        h = tl.exp2(A_i * step) * h + end
    tl.store(last + scan * numbers + i, h, mask=mask)


@triton.jit(do_not_specialize=["frames", "piece_frames", "utterances", "reverse_from"])
def message_kernel(
    dt, A, BC, z, dt_bias, lengths, dy, before,
    frames, piece_frames, channels, utterances, reverse_from,
    dt_g, dt_b, dt_t, z_g, z_b, z_t, dy_g, dy_b, dy_t,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """before (pieces, N, D): the gradient of the state before a piece, if its own frames' results
    alone count.
    """
    piece, scan, group, b, first, _frames, length, reverse = place(
        lengths, frames, piece_frames, utterances, reverse_from
    )
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    d_read = tl.minimum(d, channels - 1)
    A_n = load_states(A + group * N * channels, channels, d_read, 0, N)
    bias = parameter(dt_bias, group, channels, d_read)
    dt += group * dt_g + b * dt_b + first * dt_t + d_read
    dy += group * dy_g + b * dy_b + first * dy_t + d_read
    if z is not None:
        z += group * z_g + b * z_b + first * z_t + d_read
    BC += (scan * frames + first) * (N if PACKED else 2 * N)
    message = ()
    for _n in tl.static_range(N):
        message = message + (tl.zeros([CHANNELS], tl.float32),)
    if length > 0:
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(length - 1 - i, length, reverse)
            gate = 0.0 if z is None else tl.load(z + t * z_t)
            rows = rows + (
                (tl.load(dt + t * dt_t), tl.load(dy + t * dy_t), gate, load_row(BC, t, N, PACKED)),
            )
        for back in range(0, length, CHUNK):
            for i in tl.static_range(CHUNK):
                row_dt, row_dy, gate, row = rows[0]
                step, _slope = step_size(row_dt, bias, SOFTPLUS)
                dy_k = row_dy.to(tl.float32)
                if z is not None:
                    silu, _slope = silu_and_slope(gate)
                    dy_k *= silu
                valid = back + i < length
                step = tl.where(valid, step, 0.0)
                dy_k = tl.where(valid, dy_k, 0.0)
                new = ()
                for n in tl.static_range(0, N, 2):
                    C_even, C_odd = pair(row, N, n, 0, PACKED)
                    new = new + (tl.exp2(step * A_n[n]) * (message[n] + dy_k * C_even),)
                    if n + 1 < N:
                        dh = message[n + 1] + dy_k * C_odd
                        new = new + (tl.exp2(step * A_n[n + 1]) * dh,)
                message = new
                t = position(length - 1 - (back + CHUNK + i), length, reverse)
                gate = 0.0 if z is None else tl.load(z + t * z_t)
                rows = rows[1:] + (
                    (
                        tl.load(dt + t * dt_t),
                        tl.load(dy + t * dy_t),
                        gate,
                        load_row(BC, t, N, PACKED),
                    ),
                )
    store_states(before + piece * N * channels, message, channels, d, 0, d < channels, N)
