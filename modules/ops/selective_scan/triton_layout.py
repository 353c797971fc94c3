# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Which thread of a warp has which of the selective scan's states, and how numbers pass between.

Four neighbouring lanes share four channels, or with an extra one five: each has all of them, and a
quarter of their states, PER of them. So B and C are read, and dB and dC summed, for a quarter of
the states a lane; what is a number a channel (u, dt, y) belongs to the lane of the channel's own
number, which gives it to the other three, or gathers their shares of it (`triton_extra`: the
extra channel's).

Place i of a lane's channels has channel lane ^ i, places from the fourth the extra channels, which
stand behind the others of the warp; place n of its states has state n ^ order of its quarter, order
being another one in every group of four lanes: so a lane's own is always in the first place, and a
sum over lanes halves its vectors without a choice. Tuples hold the places (i, n) in order.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(32)  # a warp's


@triton.jit
def lanes(N: tl.constexpr):
    """-> lane, the first state of its quarter, the order of its states"""
    lane = tl.arange(0, LANES)
    PER: tl.constexpr = per_lane(N)
    if PER == 4:
        order = ((lane >> 3) & 1) + ((lane >> 3) & 2)
    elif PER == 2:
        order = lane >> 4
    else:
        order = lane * 0
    return lane, (lane & 3) * PER, order


@triton.constexpr_function
def per_lane(N):
    """A lane's states; where N is no multiple of four times as many, some lanes have none."""
    return 4 if N > 8 else 2 if N > 4 else 1


@triton.jit
def channel(block, i, EXTRA: tl.constexpr):
    """The channel at place i of a lane's, in a block of 32 and 8 EXTRA."""
    lane = tl.arange(0, LANES)
    in_block = (lane ^ i) if i < 4 else LANES + (i - 4) * 8 + (lane >> 2)
    return block * (LANES + 8 * EXTRA) + in_block


@triton.jit
def load_states(p, channels, block, EXTRA: tl.constexpr, N: tl.constexpr):
    """(N, D) at a block's channels -> a lane's; zero for channels and states that there are not."""
    _lane, own, order = lanes(N)
    PER: tl.constexpr = per_lane(N)
    states = ()
    for i in tl.static_range(4 + EXTRA):
        d = channel(block, i, EXTRA)
        for n in tl.static_range(PER):
            state = own + (n ^ order)
            there = (d < channels) & (state < N)
            states = states + (tl.load(p + state * channels + d, mask=there, other=0.0),)
    return states


@triton.jit
def store_states(p, states, channels, block, EXTRA: tl.constexpr, N: tl.constexpr):
    """The inverse of `load_states`."""
    _lane, own, order = lanes(N)
    PER: tl.constexpr = per_lane(N)
    for i in tl.static_range(4 + EXTRA):
        d = channel(block, i, EXTRA)
        for n in tl.static_range(PER):
            state = own + (n ^ order)
            at = p + state * channels + d
            tl.store(at, states[i * PER + n], mask=(d < channels) & (state < N))


@triton.jit
def keep(p, states):
    """As they lie, for the same program to `fetch`."""
    lane = tl.arange(0, LANES)
    for k in tl.static_range(len(states)):
        tl.store(p + k * LANES + lane, states[k])


@triton.jit
def fetch(p, EXTRA: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, LANES)
    states = ()
    for k in tl.static_range((4 + EXTRA) * per_lane(N)):
        states = states + (tl.load(p + k * LANES + lane),)
    return states


@triton.jit
def zeros(EXTRA: tl.constexpr, N: tl.constexpr):
    states = ()
    for _k in tl.static_range((4 + EXTRA) * per_lane(N)):
        states = states + (tl.zeros([LANES], tl.float32),)
    return states


@triton.jit
def load_row(BC, N: tl.constexpr, PACKED: tl.constexpr):
    """A row of B and C side by side: a lane has one of 2 N numbers, or, if PACKED, of N pairs.

    Of pairs there are at most 16: the upper lanes have them too (`turned`).
    """
    lane = tl.arange(0, LANES)
    if PACKED:
        lane = lane & 15
    words: tl.constexpr = N if PACKED else 2 * N
    if words == LANES or (PACKED and words == 16):
        row = tl.load(BC + lane)
    else:
        row = tl.load(BC + lane, mask=lane < words, other=0)
    return row


@triton.jit
def turned(row, PACKED: tl.constexpr):
    """The row, the upper lanes' pairs the other way round."""
    if PACKED:
        other = (row << 16) | ((row >> 16) & 65535)
        row = tl.where(tl.arange(0, LANES) < 16, row, other)
    return row


@triton.jit
def numbers(row, first, N: tl.constexpr, PACKED: tl.constexpr):
    """B (first = 0) or C (first = N) at a lane's states, of a `turned` row; of bfloat16 two in one
    shuffle.

    Shuffles share their way to the registers with exponentials, and there is where time goes.
    """
    _lane, own, order = lanes(N)
    PER: tl.constexpr = per_lane(N)
    values = ()
    if PACKED:
        for n in tl.static_range(0, PER, 2):
            state = own + (n ^ order)
            word = tl.gather(row, first // 2 + state // 2 + (state & 1) * 16, 0)
            if N != 4 * PER:
                word = tl.where(state < N, word, 0)
            values = values + ((word << 16).to(tl.float32, bitcast=True),)
            if PER > 1:
                values = values + ((word & -65536).to(tl.float32, bitcast=True),)
    else:
        for n in tl.static_range(PER):
            state = own + (n ^ order)
            value = tl.gather(row, first + state, 0)
            if N != 4 * PER:
                value = tl.where(state < N, value, 0.0)
            values = values + (value,)
    return values


@triton.jit
def of_four(x):
    """A number of each channel's own lane -> of a lane's four channels."""
    lane = tl.arange(0, LANES)
    return (x, tl.gather(x, lane ^ 1, 0), tl.gather(x, lane ^ 2, 0), tl.gather(x, lane ^ 3, 0))


@triton.jit
def sum_of_four(values):
    """Shares of a lane's four channels -> the sum of each channel's, in its own lane."""
    lane = tl.arange(0, LANES)
    far = tl.gather(values[2], lane ^ 2, 0) + tl.gather(values[3], lane ^ 3, 0)
    return values[0] + tl.gather(values[1], lane ^ 1, 0) + far


@triton.jit
def halve(values, WIDTH: tl.constexpr, BIT: tl.constexpr, ORDERED: tl.constexpr):
    """2 WIDTH vectors -> WIDTH: a lane keeps its half of them, and adds its partner's share.

    The bit BIT of a lane's number says which half is its own; if they are ORDERED, it is the first.
    """
    lane = tl.arange(0, LANES)
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
def sum_over_groups(dB, dC, N: tl.constexpr):
    """Shares of dB and dC at a lane's states -> the sum that `place_in_row` says, over channels."""
    PER: tl.constexpr = per_lane(N)
    lane = tl.arange(0, LANES)
    values = ()
    for n in tl.static_range(PER):  # the first bit to halve them by is the order's highest
        values = values + (dB[n], dC[n])
    if PER == 4:
        values = halve(values, 4, 16, True)
        values = halve(values, 2, 8, True)
        sum = halve(values, 1, 4, False)[0]
    elif PER == 2:
        values = halve(values, 2, 16, True)
        sum = halve(values, 1, 8, False)[0]
        sum += tl.gather(sum, lane ^ 4, 0)
    else:
        sum = halve(values, 1, 16, False)[0]
        sum += tl.gather(sum, lane ^ 8, 0)
        sum += tl.gather(sum, lane ^ 4, 0)
    return sum


@triton.jit
def place_in_row(N: tl.constexpr):
    """-> which of a row's 2 N numbers `sum_over_groups` gives a lane; whether it is one"""
    lane, own, order = lanes(N)
    PER: tl.constexpr = per_lane(N)
    state = own + order
    return tl.where((lane & (16 // PER)) != 0, N, 0) + state, state < N
