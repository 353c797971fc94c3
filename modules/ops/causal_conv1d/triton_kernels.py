# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the causal convolution: a program a (utterance, frames, block of channels).

K is the kernel size. A program walks along its frames with the last K inputs in registers and does
one direction or both. At step s the window is x_s .. x_{s + K - 1}, and it gives

    forward in time   pre_{s + K - 1} = bias + sum_k w_k window_k
    reverse           pre_s = bias + sum_k w_k window_{K - 1 - k}

so both directions read every input once. Inputs from the length on, and before the first frame,
are zero. Little arithmetic stands behind a long wait for memory, so the rows of the next CHUNK
steps are loaded while the current ones are computed. Arithmetic is float32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def row_at(rows, t, stride):
    """Pointers to frame t; it is worked out once a chunk, as 64 bits are slow."""
    return rows + tl.cast(t, tl.int64) * stride


@triton.jit
def load_row(rows, i, stride, inside):
    """The i-th row from rows on, zero where it is not inside."""
    return tl.load(rows + i * stride, mask=inside, other=0)


@triton.jit
def store_row(rows, i, channels, value, t, length, inside):
    """Store frame t in the i-th row from rows on, as zero from the length on."""
    value = tl.where(t < length, value, 0.0).to(rows.dtype.element_ty)
    tl.store(rows + i * channels, value, mask=inside)


@triton.jit
def load_taps(weight, bias, direction, d, channels, mask, WIDTH: tl.constexpr):
    """w_0 .. w_{K - 1} of (directions, D, K), then the bias, (directions, D), zero if None."""
    row = direction * channels + d
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + row * WIDTH + k, mask=mask, other=0).to(tl.float32),)
    last = tl.zeros(d.shape, tl.float32)
    if bias is not None:
        last = tl.load(bias + row, mask=mask, other=0).to(tl.float32)
    return taps + (last,)


@triton.jit
def convolve(taps, window, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """bias + sum_k w_k window_k, the window mirrored in reverse."""
    total = taps[WIDTH]
    for k in tl.static_range(WIDTH):
        total += taps[k] * window[WIDTH - 1 - k if REVERSE else k]
    return total


@triton.jit
def activate(pre, SILU: tl.constexpr):
    return pre / (1.0 + tl.exp2(pre * -LOG2E)) if SILU else pre


@triton.jit
def through_activation(dy, pre, SILU: tl.constexpr):
    """Gradient of the activation's result -> of what went in."""
    if SILU:
        s = sigmoid(pre)
        dy *= s * (1.0 + pre * (1.0 - s))
    return dy


@triton.jit(do_not_specialize=["frames", "tile"])  # one build for every number of frames
def forward_kernel(
    x, weight, bias, lengths, y,
    frames, channels, tile, x_b, x_t,
    WIDTH: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y (directions, B, T, D). Steps start at 1 - K, where the first frame's result falls."""
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    length = frames
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), frames).to(tl.int32)
    first = tl.program_id(1) * tile - (WIDTH - 1)
    last = tl.minimum(first + tile, frames)
    stop = tl.minimum(last + WIDTH - 1, length)  # of the inputs
    # Pointers follow the newest frame of the window, y_reverse the oldest.
    newest = first + WIDTH - 1
    x = row_at(x + b * x_b + d, newest, x_t)
    y += b * frames * channels + d
    y_reverse = row_at(y, first, channels)
    y = row_at(y, newest, channels)
    if FORWARD:
        y_reverse += tl.num_programs(2).to(tl.int64) * frames * channels
        taps = load_taps(weight, bias, 0, d, channels, mask, WIDTH)
    if REVERSE:
        taps_reverse = load_taps(weight, bias, 1 if FORWARD else 0, d, channels, mask, WIDTH)

    window = ()
    for k in tl.static_range(WIDTH - 1):
        inside = mask & (first + k >= 0) & (first + k < stop)
        window = window + (load_row(x, k - WIDTH + 1, x_t, inside).to(tl.float32),)
    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + (load_row(x, i, x_t, mask & (newest + i < stop)),)
    for s in range(first, last, CHUNK):
        t = s + WIDTH - 1
        x += CHUNK * x_t
        ahead = ()
        for i in tl.static_range(CHUNK):
            ahead = ahead + (load_row(x, i, x_t, mask & (t + CHUNK + i < stop)),)
        for i in tl.static_range(CHUNK):
            window = window + (rows[i].to(tl.float32),)
            if FORWARD:
                value = activate(convolve(taps, window, WIDTH, False), SILU)
                store_row(y, i, channels, value, t + i, length, mask & (t + i < frames))
            if REVERSE:
                value = activate(convolve(taps_reverse, window, WIDTH, True), SILU)
                inside = mask & (s + i >= 0) & (s + i < frames)
                store_row(y_reverse, i, channels, value, s + i, length, inside)
            window = window[1:]
        y += CHUNK * channels
        y_reverse += CHUNK * channels
        rows = ahead


@triton.jit
def backward_rows(
    x, dy, dy_reverse, more, more_reverse, i, s, stop, x_t, dy_t, mask,
    WIDTH: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """x and dy at s + K - 1, reverse dy at s: what step s adds to the windows. Rows as for x.

    A dy is a pair: what is there and what is to be added to it, not yet added, to be on its way.
    """
    inside = mask & (s + WIDTH - 1 < stop)
    row_x = load_row(x, i, x_t, inside)
    pair = load_pair(dy, more, i, dy_t, inside) if FORWARD else (row_x, row_x)
    inside = mask & (s >= 0) & (s < stop)
    reverse = load_pair(dy_reverse, more_reverse, i, dy_t, inside) if REVERSE else (row_x, row_x)
    return row_x, pair, reverse


@triton.jit
def load_pair(dy, more, i, dy_t, inside):
    """The i-th rows of both; of one twice, if there is no other."""
    row = load_row(dy, i, dy_t, inside)
    return row, row if more is None else load_row(more, i, dy_t, inside)


@triton.jit
def sum_of(pair, more):
    total = pair[0].to(tl.float32)
    return total if more is None else total + pair[1].to(tl.float32)


@triton.jit(do_not_specialize=["frames", "tile"])  # one build for every number of frames
def backward_kernel(
    x, weight, bias, lengths, dy, more,
    dx, partial,
    frames, channels, tile, x_b, x_t, dy_d, dy_b, dy_t,
    WIDTH: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx (B, T, D) over both directions; partial (B x tiles, directions, K + 1, D) dweight, dbias.

    more: None, or as dy, to be added to it.

    With d_t the gradient of pre_t, sums over k:

        forward in time   dx_s += w_k d_{s + K - 1 - k}, dw_k += x_s d_{s + K - 1 - k}
        reverse           dx_s += w_k d_{s - K + 1 + k}, dw_k += x_s d_{s - K + 1 + k}

    so each direction keeps a window of K of them, and step s adds d_{s + K - 1} or d_s, which need
    the same window of x. K - 1 steps before the first frame fill the windows.
    """
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    length = frames
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), frames).to(tl.int32)
    first = tl.program_id(1) * tile
    last = tl.minimum(first + tile, frames)
    stop = tl.minimum(last + WIDTH - 1, length)  # of the inputs
    # Pointers follow the newest frame of the window, dy_reverse and dx the oldest.
    newest = first + WIDTH - 1
    x = row_at(x + b * x_b + d, newest, x_t)
    dy += b * dy_b + d
    dy_reverse = row_at(dy, first, dy_t)
    dy = row_at(dy, newest, dy_t)
    more_reverse = more
    if more is not None:
        more += b * dy_b + d
        more_reverse = row_at(more, first, dy_t) + (dy_d if FORWARD else 0)
        more = row_at(more, newest, dy_t)
    dx = row_at(dx + b * frames * channels + d, first, channels)
    zero = tl.zeros([CHANNELS], tl.float32)
    # Without a direction its tuples stay empty; they are named all the same, for the loop.
    taps, ds, sums = (), (), ()
    taps_reverse, ds_reverse, sums_reverse = (), (), ()
    if FORWARD:
        dy_reverse += dy_d
        taps = load_taps(weight, bias, 0, d, channels, mask, WIDTH)
        for _ in tl.static_range(WIDTH + 1):
            sums = sums + (zero,)
    if REVERSE:
        taps_reverse = load_taps(weight, bias, 1 if FORWARD else 0, d, channels, mask, WIDTH)
        for _ in tl.static_range(WIDTH + 1):
            sums_reverse = sums_reverse + (zero,)

    window = ()
    for k in tl.static_range(WIDTH - 1):
        t = first - WIDTH + 1 + k
        row_x = load_row(x, k - 2 * WIDTH + 2, x_t, mask & (t >= 0) & (t < stop))
        window = window + (row_x.to(tl.float32),)
    for i in tl.static_range(1 - WIDTH, 0):
        row_x, row_dy, row_reverse = backward_rows(
            x, dy, dy_reverse, more, more_reverse, i, first + i, stop, x_t, dy_t, mask,
            WIDTH, FORWARD, REVERSE,
        )  # fmt: skip
        window = window + (row_x.to(tl.float32),)
        if FORWARD:
            pre = convolve(taps, window, WIDTH, False)
            ds = ds + (through_activation(sum_of(row_dy, more), pre, SILU),)
        if REVERSE:
            pre = convolve(taps_reverse, window, WIDTH, True)
            ds_reverse = ds_reverse + (through_activation(sum_of(row_reverse, more), pre, SILU),)
        window = window[1:]

    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + backward_rows(
            x, dy, dy_reverse, more, more_reverse, i, first + i, stop, x_t, dy_t, mask,
            WIDTH, FORWARD, REVERSE,
        )  # fmt: skip
    for s in range(first, last, CHUNK):
        x += CHUNK * x_t
        dy += CHUNK * dy_t
        dy_reverse += CHUNK * dy_t
        if more is not None:
            more += CHUNK * dy_t
            more_reverse += CHUNK * dy_t
        ahead = ()
        for i in tl.static_range(CHUNK):
            ahead = ahead + backward_rows(
                x, dy, dy_reverse, more, more_reverse, i, s + CHUNK + i, stop, x_t, dy_t, mask,
                WIDTH, FORWARD, REVERSE,
            )  # fmt: skip
        for i in tl.static_range(CHUNK):
            window = window + (rows[3 * i].to(tl.float32),)
            dx_s = zero
            if FORWARD:
                pre = convolve(taps, window, WIDTH, False)
                ds = ds + (through_activation(sum_of(rows[3 * i + 1], more), pre, SILU),)
                added = ()
                for k in tl.static_range(WIDTH):
                    dx_s += taps[k] * ds[WIDTH - 1 - k]
                    added = added + (sums[k] + window[0] * ds[WIDTH - 1 - k],)
                sums = added + (sums[WIDTH] + ds[0],)
                ds = ds[1:]
            if REVERSE:
                pre = convolve(taps_reverse, window, WIDTH, True)
                d_s = through_activation(sum_of(rows[3 * i + 2], more), pre, SILU)
                ds_reverse = ds_reverse + (d_s,)
                added = ()
                for k in tl.static_range(WIDTH):
                    dx_s += taps_reverse[k] * ds_reverse[k]
                    added = added + (sums_reverse[k] + window[0] * ds_reverse[k],)
                sums_reverse = added + (sums_reverse[WIDTH] + ds_reverse[WIDTH - 1],)
                ds_reverse = ds_reverse[1:]
            store_row(dx, i, channels, dx_s, s + i, length, mask & (s + i < frames))
            window = window[1:]
        dx += CHUNK * channels
        rows = ahead

    program = b * tl.num_programs(1) + tl.program_id(1)
    total = sums + sums_reverse  # (directions, K + 1)
    partial += program * len(total) * channels + d
    for k in tl.static_range(len(total)):
        tl.store(partial + k * channels, total[k], mask=mask)
