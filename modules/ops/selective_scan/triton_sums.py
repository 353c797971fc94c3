# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels that put together what the selective scan's programs leave: shares and pieces.

A scan in pieces takes two passes. The first gives every piece its final state from a zero state,
and its steps' sum; as the states' recurrence is linear, `chain_kernel` then finds where each piece
starts: h <- exp(A sum of steps) h + its final state. The gradient runs through the pieces the same
way, from the last to the first. The second pass scans every piece from its start.
"""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_frames import (
    at,
    bias_of,
    decays_of,
    place,
    position,
    silu_and_slope,
    step_size,
)
from modules.ops.selective_scan.triton_layout import (
    LANES,
    load_row,
    load_states,
    numbers,
    of_four,
    per_lane,
    store_states,
    turned,
    zeros,
)

AT_ONCE = tl.constexpr(4)  # blocks whose shares are on their way together


@triton.jit(do_not_specialize=["blocks", "frames"])
def sum_blocks_kernel(shares, dB, dC, blocks, frames, N: tl.constexpr, TILE: tl.constexpr):
    """shares (scans, blocks, T, 2 N) -> dB, dC (scans, T, N), block after block."""
    numbers = frames * (2 * N)
    scan = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    shares += scan * blocks * numbers + i
    sum = tl.zeros([TILE], tl.float32)
    for first in range(0, blocks, AT_ONCE):
        loaded = ()
        for k in tl.static_range(AT_ONCE):
            there = (i < numbers) & (first + k < blocks)
            loaded = loaded + (tl.load(shares + k * numbers, mask=there, other=0.0),)
        for k in tl.static_range(AT_ONCE):
            sum += loaded[k]
        shares += AT_ONCE * numbers
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


@triton.jit
def load_message(dt, dy, z, BC, t, dt_t, dy_t, z_t, words, N: tl.constexpr, PACKED: tl.constexpr):
    """-> dt, dy and z (0 if there is none) of frame t, its row of B and C"""
    gate = 0.0 if z is None else tl.load(at(z, t, z_t))
    row = load_row(at(BC, t, words), N, PACKED)
    return tl.load(at(dt, t, dt_t)), tl.load(at(dy, t, dy_t)), gate, row


@triton.jit(do_not_specialize=["frames", "piece_frames", "utterances", "reverse_from"])
def message_kernel(
    dt, A, BC, z, dt_bias, lengths, dy, before,
    frames, piece_frames, channels, utterances, reverse_from, words,
    dt_g, dt_b, dt_t, z_g, z_b, z_t, dy_g, dy_b, dy_t,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """before (pieces, N, D): the gradient of the state before a piece, if its own frames' results
    alone count.
    """
    piece, scan, group, b, first, _frames, length, origin, sign = place(
        lengths, frames, piece_frames, utterances, reverse_from
    )
    PER: tl.constexpr = per_lane(N)
    block = tl.program_id(0)
    d = block * LANES + tl.arange(0, LANES)
    d_read = tl.minimum(d, channels - 1)
    A_n = load_states(A + group * N * channels, channels, block, 0, N)
    bias = bias_of(dt_bias, group, channels, d)
    dt += group * dt_g + b * dt_b + first * dt_t + d_read
    dy += group * dy_g + b * dy_b + first * dy_t + d_read
    if z is not None:
        z += group * z_g + b * z_b + first * z_t + d_read
    BC += (scan * frames + first) * words
    message = zeros(0, N)
    if length > 0:
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(length - 1 - i, length, origin, sign)
            rows = rows + (load_message(dt, dy, z, BC, t, dt_t, dy_t, z_t, words, N, PACKED),)
        for back in range(0, length, CHUNK):
            for i in tl.static_range(CHUNK):
                row_dt, row_dy, gate, row = rows[0]
                valid = back + i < length
                step, _slope = step_size(row_dt, bias, valid, SOFTPLUS)
                dy_k = tl.where(valid, row_dy.to(tl.float32), 0.0)
                if z is not None:
                    silu, _slope = silu_and_slope(gate)
                    dy_k *= silu
                decays = decays_of(of_four(step), A_n, N)
                C = numbers(turned(row, PACKED), N, N, PACKED)
                dy_four = of_four(dy_k)
                new = ()
                for m in tl.static_range(4):
                    for n in tl.static_range(PER):
                        dh = message[m * PER + n] + dy_four[m] * C[n]
                        new = new + (decays[m * PER + n] * dh,)
                message = new
                t = position(length - 1 - (back + CHUNK + i), length, origin, sign)
                frame = load_message(dt, dy, z, BC, t, dt_t, dy_t, z_t, words, N, PACKED)
                rows = rows[1:] + (frame,)
    store_states(before + piece * N * channels, message, channels, block, 0, N)
