# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the depthwise convolution: a program a (block of channels, frames, utterance).

K is the kernel size and R = (K - 1) / 2 its reach. A program walks along its frames with the K rows
around the current one in registers, so each row is loaded and converted once, not K times. The rows
of the next CHUNK steps are loaded while the current ones are computed. Arithmetic is float32.
"""

import triton
import triton.language as tl

from modules.ops.causal_conv1d.triton_kernels import convolve, load_row, row_at


@triton.jit
def load_taps(weight, bias, d, channels, mask, WIDTH: tl.constexpr):
    """w_0 .. w_{K - 1} of (K, D), then the bias, (D,), zero if None."""
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (load_row(weight + d, k, channels, mask).to(tl.float32),)
    last = tl.zeros(d.shape, tl.float32)
    if bias is not None:
        last = tl.load(bias + d, mask=mask, other=0).to(tl.float32)
    return taps + (last,)


@triton.jit
def load_window(rows, t, stop, stride, mask, WIDTH: tl.constexpr):
    """Frames t - (K - 1) .. t - 1 in float32, zero before the first and from stop on.

    rows point to frame t.
    """
    window = ()
    for k in tl.static_range(1 - WIDTH, 0):
        inside = mask & (t + k >= 0) & (t + k < stop)
        window = window + (load_row(rows, k, stride, inside).to(tl.float32),)
    return window


@triton.jit
def load_chunk(rows, t, stop, stride, mask, CHUNK: tl.constexpr):
    """Frames t .. t + CHUNK - 1, zero from stop on; rows point to frame t."""
    chunk = ()
    for i in tl.static_range(CHUNK):
        chunk = chunk + (load_row(rows, i, stride, mask & (t + i < stop)),)
    return chunk


@triton.jit
def length_of(lengths, b, frames):
    return tl.minimum(tl.maximum(tl.load(lengths + b), 0), frames).to(tl.int32)


@triton.jit(do_not_specialize=["frames", "tile"])  # one build for every number of frames
def forward_kernel(
    x, weight, bias, lengths, y,
    frames, channels, tile, x_b, x_t,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y_t = bias + sum_k w_k x_{t - R + k}; the tile is whole chunks, to the last frame at most."""
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    first = tl.program_id(1) * tile
    last = tl.minimum(first + tile, frames)
    stop = tl.minimum(last + WIDTH // 2, length_of(lengths, b, frames))
    newest = first + WIDTH // 2  # of the window, and what x points to
    x = row_at(x + b * x_b + d, newest, x_t)
    y = row_at(y + b * frames * channels + d, first, channels)
    taps = load_taps(weight, bias, d, channels, mask, WIDTH)
    window = load_window(x, newest, stop, x_t, mask, WIDTH)
    rows = load_chunk(x, newest, stop, x_t, mask, CHUNK)
    for t in range(first, last, CHUNK):
        x += CHUNK * x_t
        ahead = load_chunk(x, t + WIDTH // 2 + CHUNK, stop, x_t, mask, CHUNK)
        for i in tl.static_range(CHUNK):
            window = window + (rows[i].to(tl.float32),)
            value = convolve(taps, window, WIDTH, False).to(y.dtype.element_ty)
            tl.store(y + i * channels, value, mask=mask & (t + i < last))
            window = window[1:]
        y += CHUNK * channels
        rows = ahead


@triton.jit(do_not_specialize=["frames", "tile"])  # one build for every number of frames
def backward_kernel(
    x, weight, lengths, dy,
    dx, partial,
    frames, channels, tile, x_b, x_t, dy_b, dy_t,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx_s = sum_k w_k dy_{s + R - k}; partial (B x tiles, K + 1, D): dweight, then dbias.

    dw_k sums x_s dy_{s + R - k} over frames s: it needs the same window of dy as dx_s. Frames past
    a tile's last are past the sequence's, where dy counts as zero, so they add nothing.
    """
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    first = tl.program_id(1) * tile
    last = tl.minimum(first + tile, frames)
    length = length_of(lengths, b, frames)
    newest = first + WIDTH // 2  # of the window, and what dy points to
    x = row_at(x + b * x_b + d, first, x_t)
    dy = row_at(dy + b * dy_b + d, newest, dy_t)
    dx = row_at(dx + b * frames * channels + d, first, channels)
    taps = load_taps(weight, None, d, channels, mask, WIDTH)
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (tl.zeros([CHANNELS], tl.float32),)
    window = load_window(dy, newest, frames, dy_t, mask, WIDTH)
    rows = load_chunk(dy, newest, frames, dy_t, mask, CHUNK)
    rows_x = load_chunk(x, first, length, x_t, mask, CHUNK)
    for s in range(first, last, CHUNK):
        x += CHUNK * x_t
        dy += CHUNK * dy_t
        ahead = load_chunk(dy, s + WIDTH // 2 + CHUNK, frames, dy_t, mask, CHUNK)
        ahead_x = load_chunk(x, s + CHUNK, length, x_t, mask, CHUNK)
        for i in tl.static_range(CHUNK):
            window = window + (rows[i].to(tl.float32),)
            value = tl.where(s + i < length, convolve(taps, window, WIDTH, True), 0.0)
            tl.store(dx + i * channels, value.to(dx.dtype.element_ty), mask=mask & (s + i < last))
            row_x = rows_x[i].to(tl.float32)
            added = ()
            for k in tl.static_range(WIDTH):
                added = added + (sums[k] + row_x * window[WIDTH - 1 - k],)
            sums = added + (sums[WIDTH] + window[WIDTH // 2],)
            window = window[1:]
        dx += CHUNK * channels
        rows = ahead
        rows_x = ahead_x

    program = b * tl.num_programs(1) + tl.program_id(1)
    partial += program * (WIDTH + 1) * channels + d
    for k in tl.static_range(WIDTH + 1):
        tl.store(partial + k * channels, sums[k], mask=mask)
