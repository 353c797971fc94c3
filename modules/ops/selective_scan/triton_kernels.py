# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the selective scan: what both share, and the forward.

A program is one warp: a thread a channel, which keeps the channel's N states in registers in
float32 and walks along time to the utterance's own length. No number passes between threads, but
for the rows of B and C: a lane holds a number of a frame's row (two, PACKED in a word, if they are
bfloat16), and a shuffle gives it to all.
Nothing is kept in shared memory, so there is nothing to wait for but the loads, and those of the
next CHUNK frames are on their way while the current ones are computed.

One launch serves one direction or both: scans are numbered group by group, a group has a set of
parameters and `utterances` scans, and from scan `reverse_from` on time runs from an utterance's
last frame to its first. A scan of many frames may be cut into pieces, a program each; without
pieces, piece_frames is the number of frames.

d numbers channels, n states, k frames in the order of the scan, t frames in time. A comes
multiplied by log2(e), so that exp(dt A) is one exp2. A tuple holds a vector of channels a state.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
CHANNELS = tl.constexpr(32)  # a program's: one a thread of its warp


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 within 2e-7 of its value: 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    q = s * s
    # Chebyshev fit of artanh(s) / s on s <= 1/3, of relative error 2e-9.
    p = 0.112
    p = p * q + 0.1428
    p = p * q + 0.2
    p = p * q + 0.3333333
    return 2.0 * s * (p * q + 1.0)


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    """dt as projected -> the step, its derivative."""
    x = dt.to(tl.float32) + bias
    if SOFTPLUS:
        e = tl.exp2(-tl.abs(x) * LOG2E)
        sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        x = tl.maximum(x, 0.0) + log1p(e)
    else:
        sigmoid = x * 0.0 + 1.0
    return x, sigmoid


@triton.jit
def silu_and_slope(z):
    """silu(z), its derivative."""
    z = z.to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    silu = z * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def position(k, length, reverse):
    """The k-th frame of the scan, in time; the nearest valid one's if there is no such frame."""
    k = tl.maximum(tl.minimum(k, length - 1), 0)
    return tl.where(reverse, length - 1 - k, k)


@triton.jit
def place(lengths, frames, piece_frames, utterances, reverse_from):
    """What the program scans.

    -> piece (over all scans), scan, its group, its utterance, the piece's first frame, its frames,
    how many of them are valid, whether time runs backwards
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
    reverse = scan >= reverse_from
    return (
        piece.to(tl.int64), scan.to(tl.int64), group.to(tl.int64), b.to(tl.int64),
        first.to(tl.int64), frames, length, reverse,
    )  # fmt: skip


@triton.jit
def parameter(p, group, channels, d):
    """A parameter (groups, D) at channels d in float32; zero if there is none."""
    if p is None:
        x = tl.zeros([CHANNELS], tl.float32)
    else:
        x = tl.load(p + group * channels + d).to(tl.float32)
    return x


@triton.jit
def load_states(p, channels, d, order, N: tl.constexpr):
    """(N, D) at channels d -> a vector a state; place n has number n ^ order (0: in order)."""
    states = ()
    for n in tl.static_range(N):
        states = states + (tl.load(p + (n ^ order) * channels + d),)
    return states


@triton.jit
def store_states(p, states, channels, d, order, d_mask, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(p + (n ^ order) * channels + d, states[n], mask=d_mask)


@triton.jit
def load_row(BC, t, N: tl.constexpr, PACKED: tl.constexpr):
    """Row t of B and C side by side: one of 2 N numbers a lane, or of N words if PACKED."""
    lane = tl.arange(0, CHANNELS)
    words: tl.constexpr = N if PACKED else 2 * N
    if words == CHANNELS:
        row = tl.load(BC + t * words + lane)
    else:
        row = tl.load(BC + t * words + lane, mask=lane < words, other=0)
    return row


@triton.jit
def pair(row, first, n, order, PACKED: tl.constexpr):
    """B (first = 0) or C (first = N) at places n and n + 1, n even; of bfloat16 in one shuffle.

    Shuffles share their way to the registers with exponentials, and there is where time goes.
    """
    place = tl.full([CHANNELS], n, tl.int32) ^ order
    if PACKED:
        word = tl.gather(row, first // 2 + place // 2, 0)
        even = (word << 16).to(tl.float32, bitcast=True)
        odd = (word & -65536).to(tl.float32, bitcast=True)
    else:
        even = tl.gather(row, first + place, 0)
        odd = tl.gather(row, first + place + 1, 0)
    return even, odd


@triton.jit
def load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, N: tl.constexpr, PACKED: tl.constexpr):
    """-> u, dt and z (0 if there is none) of frame t, its row of B and C"""
    gate = 0.0 if z is None else tl.load(z + t * z_t)
    return tl.load(u + t * u_t), tl.load(dt + t * dt_t), gate, load_row(BC, t, N, PACKED)


# One build for every number of frames and utterances.
@triton.jit(do_not_specialize=["frames", "piece_frames", "utterances", "reverse_from"])
def forward_kernel(
    u, dt, A, BC, D, z, dt_bias, lengths, initial,
    y, final, starts, total,
    frames, piece_frames, channels, utterances, reverse_from,
    u_g, u_b, u_t, dt_g, dt_b, dt_t, z_g, z_b, z_t,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """final (pieces, N, D) gets the state after the last frame.

    If wanted, y gets the result, starts (pieces, segments, N, D) the state before every SEGMENT
    frames, total (pieces, D) the sum of the steps.
    """
    piece, scan, group, b, first, own_frames, length, reverse = place(
        lengths, frames, piece_frames, utterances, reverse_from
    )
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    d_mask = d < channels
    d_read = tl.minimum(d, channels - 1)  # loads without a mask; what it says too much, none stores

    A_n = load_states(A + group * N * channels, channels, d_read, 0, N)
    skip = parameter(D, group, channels, d_read)
    bias = parameter(dt_bias, group, channels, d_read)
    if initial is None:
        h = ()
        for _n in tl.static_range(N):
            h = h + (tl.zeros([CHANNELS], tl.float32),)
    else:
        h = load_states(initial + piece * N * channels, channels, d_read, 0, N)
    u += group * u_g + b * u_b + first * u_t + d_read
    dt += group * dt_g + b * dt_b + first * dt_t + d_read
    if z is not None:
        z += group * z_g + b * z_b + first * z_t + d_read
    BC += (scan * frames + first) * (N if PACKED else 2 * N)
    if y is not None:
        y += (scan * frames + first) * channels + d
    if starts is not None:
        starts += piece * tl.cdiv(piece_frames, SEGMENT) * N * channels
    steps = tl.zeros([CHANNELS], tl.float32)

    if length > 0:
        rows = ()
        for i in tl.static_range(CHUNK):
            t = position(i, length, reverse)
            rows = rows + (load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, N, PACKED),)
        for k in range(0, length, CHUNK):
            if starts is not None:  # noqa: SIM102 - one is known when compiling
                if k % SEGMENT == 0:
                    store_states(starts, h, channels, d, 0, d_mask, N)
                    starts += N * channels
            # All at once: a wait for one load is a wait for those asked for after it, too.
            ahead = ()
            for i in tl.static_range(CHUNK):
                t = position(k + CHUNK + i, length, reverse)
                ahead = ahead + (load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, N, PACKED),)
            for i in tl.static_range(CHUNK):
                row_u, row_dt, gate, row = rows[i]
                u_k = row_u.to(tl.float32)
                step, _slope = step_size(row_dt, bias, SOFTPLUS)
                step = tl.where(k + i < length, step, 0.0)
                steps += step
                dt_u = step * u_k
                new = ()
                y_even = skip * u_k  # two sums: half the wait for each other
                y_odd = tl.zeros([CHANNELS], tl.float32)
                for n in tl.static_range(0, N, 2):
                    B_even, B_odd = pair(row, 0, n, 0, PACKED)
                    new = new + (tl.exp2(step * A_n[n]) * h[n] + dt_u * B_even,)
                    if n + 1 < N:
                        new = new + (tl.exp2(step * A_n[n + 1]) * h[n + 1] + dt_u * B_odd,)
                    if y is not None:
                        C_even, C_odd = pair(row, N, n, 0, PACKED)
                        y_even += new[n] * C_even
                        if n + 1 < N:
                            y_odd += new[n + 1] * C_odd
                h = new
                if y is not None:
                    y_k = y_even + y_odd
                    if z is not None:
                        silu, _slope = silu_and_slope(gate)
                        y_k *= silu
                    t = position(k + i, length, reverse)
                    valid = d_mask & (k + i < length)
                    tl.store(y + t * channels, y_k.to(y.dtype.element_ty), mask=valid)
            rows = ahead

    if y is not None:
        zero = tl.zeros([CHANNELS], y.dtype.element_ty)
        for t in range(length, own_frames):
            tl.store(y + t * channels, zero, mask=d_mask)
    if total is not None:
        tl.store(total + piece * channels + d, steps, mask=d_mask)
    store_states(final + piece * N * channels, h, channels, d, 0, d_mask, N)
