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
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def load_row(rows, t, stop, stride, mask):
    """Row t of (T, channels); zero before the first and from stop on."""
    return tl.load(rows + tl.cast(t, tl.int64) * stride, mask=mask & (t >= 0) & (t < stop), other=0)


@triton.jit
def store_row(rows, value, t, length, frames, channels, mask):
    """Store frame t of a dense (T, channels), zero from the length on; nothing outside (0, T)."""
    value = tl.where(t < length, value, 0.0).to(rows.dtype.element_ty)
    inside = mask & (t >= 0) & (t < frames)
    tl.store(rows + tl.cast(t, tl.int64) * channels, value, mask=inside)


@triton.jit
def load_taps(weight, bias, direction, d, channels, mask, WIDTH: tl.constexpr):
    """w_0 .. w_{K - 1} of (directions, D, K), then the bias, (directions, D), zero if None."""
    row = direction * channels + d
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + row * WIDTH + k, mask=mask, other=0).to(tl.float32),)
    if bias is None:
        return taps + (tl.zeros_like(taps[0]),)
    return taps + (tl.load(bias + row, mask=mask, other=0).to(tl.float32),)


@triton.jit
def convolve(taps, window, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """bias + sum_k w_k window_k, the window mirrored in reverse."""
    total = taps[WIDTH]
    for k in tl.static_range(WIDTH):
        total += taps[k] * window[WIDTH - 1 - k if REVERSE else k]
    return total


@triton.jit
def activate(pre, SILU: tl.constexpr):
    return pre * sigmoid(pre) if SILU else pre


@triton.jit
def through_activation(dy, pre, SILU: tl.constexpr):
    """Gradient of the activation's result -> of what went in."""
    dy = dy.to(tl.float32)
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
    x += b * x_b + d
    y += b * frames * channels + d
    y_reverse = y
    if FORWARD:
        y_reverse += tl.num_programs(2).to(tl.int64) * frames * channels
        taps = load_taps(weight, bias, 0, d, channels, mask, WIDTH)
    if REVERSE:
        taps_reverse = load_taps(weight, bias, 1 if FORWARD else 0, d, channels, mask, WIDTH)

    window = ()
    for k in tl.static_range(WIDTH - 1):
        window = window + (load_row(x, first + k, stop, x_t, mask).to(tl.float32),)
    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + (load_row(x, first + WIDTH - 1 + i, stop, x_t, mask),)
    for start in range(first, last, CHUNK):
        ahead = ()
        for i in tl.static_range(CHUNK):
            ahead = ahead + (load_row(x, start + CHUNK + WIDTH - 1 + i, stop, x_t, mask),)
        for i in tl.static_range(CHUNK):
            window = window + (rows[i].to(tl.float32),)
            if FORWARD:
                value = activate(convolve(taps, window, WIDTH, False), SILU)
                store_row(y, value, start + i + WIDTH - 1, length, frames, channels, mask)
            if REVERSE:
                value = activate(convolve(taps_reverse, window, WIDTH, True), SILU)
                store_row(y_reverse, value, start + i, length, frames, channels, mask)
            window = window[1:]
        rows = ahead


@triton.jit
def backward_rows(
    x, dy, dy_reverse, s, stop, x_t, dy_t, mask,
    WIDTH: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """x and dy at s + K - 1, reverse dy at s: what step s adds to the windows."""
    row_x = load_row(x, s + WIDTH - 1, stop, x_t, mask)
    row_dy = load_row(dy, s + WIDTH - 1, stop, dy_t, mask) if FORWARD else row_x
    row_reverse = load_row(dy_reverse, s, stop, dy_t, mask) if REVERSE else row_x
    return row_x, row_dy, row_reverse


@triton.jit(do_not_specialize=["frames", "tile"])  # one build for every number of frames
def backward_kernel(
    x, weight, bias, lengths, dy,
    dx, partial,
    frames, channels, tile, x_b, x_t, dy_d, dy_b, dy_t,
    WIDTH: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx (B, T, D) over both directions; partial (B x tiles, directions, K + 1, D) dweight, dbias.

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
    x += b * x_b + d
    dy += b * dy_b + d
    dy_reverse = dy
    dx += b * frames * channels + d
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
        window = window + (load_row(x, first - WIDTH + 1 + k, stop, x_t, mask).to(tl.float32),)
    for i in tl.static_range(WIDTH - 1):
        row_x, row_dy, row_reverse = backward_rows(
            x, dy, dy_reverse, first - WIDTH + 1 + i, stop, x_t, dy_t, mask, WIDTH, FORWARD, REVERSE
        )
        window = window + (row_x.to(tl.float32),)
        if FORWARD:
            ds = ds + (through_activation(row_dy, convolve(taps, window, WIDTH, False), SILU),)
        if REVERSE:
            pre = convolve(taps_reverse, window, WIDTH, True)
            ds_reverse = ds_reverse + (through_activation(row_reverse, pre, SILU),)
        window = window[1:]

    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + backward_rows(
            x, dy, dy_reverse, first + i, stop, x_t, dy_t, mask, WIDTH, FORWARD, REVERSE
        )
    for start in range(first, last, CHUNK):
        ahead = ()
        for i in tl.static_range(CHUNK):
            ahead = ahead + backward_rows(
                x, dy, dy_reverse, start + CHUNK + i, stop, x_t, dy_t, mask, WIDTH, FORWARD, REVERSE
            )
        for i in tl.static_range(CHUNK):
            window = window + (rows[3 * i].to(tl.float32),)
            dx_s = zero
            if FORWARD:
                pre = convolve(taps, window, WIDTH, False)
                ds = ds + (through_activation(rows[3 * i + 1], pre, SILU),)
                added = ()
                for k in tl.static_range(WIDTH):
                    dx_s += taps[k] * ds[WIDTH - 1 - k]
                    added = added + (sums[k] + window[0] * ds[WIDTH - 1 - k],)
                sums = added + (sums[WIDTH] + ds[0],)
                ds = ds[1:]
            if REVERSE:
                pre = convolve(taps_reverse, window, WIDTH, True)
                ds_reverse = ds_reverse + (through_activation(rows[3 * i + 2], pre, SILU),)
                added = ()
                for k in tl.static_range(WIDTH):
                    dx_s += taps_reverse[k] * ds_reverse[k]
                    added = added + (sums_reverse[k] + window[0] * ds_reverse[k],)
                sums_reverse = added + (sums_reverse[WIDTH] + ds_reverse[WIDTH - 1],)
                ds_reverse = ds_reverse[1:]
            store_row(dx, dx_s, start + i, length, frames, channels, mask)
            window = window[1:]
        rows = ahead

    program = b * tl.num_programs(1) + tl.program_id(1)
    total = sums + sums_reverse  # (directions, K + 1)
    partial += program * len(total) * channels + d
    for k in tl.static_range(len(total)):
        tl.store(partial + k * channels, total[k], mask=mask)
