# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels over frames (F, C) of an utterance, rows of F C numbers; arithmetic is float32."""

import triton
import triton.language as tl

SIZES = ["frames", "utterances"]  # which change from batch to batch


@triton.jit
def scramble(x):
    x = x * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def kept(keys, row, e, threshold, SIZE: tl.constexpr):
    """Whether dropout leaves element e of a row, as in `modules.dropout.keep`."""
    number = (row * SIZE).to(tl.uint32) + e.to(tl.uint32)
    number = number ^ tl.load(keys).to(tl.uint32, bitcast=True)
    number = scramble(number ^ (number >> 16))
    drawn = scramble(number ^ tl.load(keys + 1).to(tl.uint32, bitcast=True))
    return drawn.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def ending(
    value, row, e, w, shift, keys, mean, deviation, slope, threshold, scale,
    SIZE: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """What becomes of elements e of a row, of weights w and shift."""
    y = (value - mean) * deviation * w + shift
    y = tl.where(y > 0, y, y * slope)
    if DROPS:
        y = tl.where(kept(keys, row, e, threshold, SIZE), y * scale, 0.0)
    return y


@triton.jit
def load_parts(row, SIZE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """A row in PARTS of WIDTH numbers, which waste fewer threads than a power of two of them."""
    parts = ()
    for i in tl.static_range(PARTS):
        e = i * WIDTH + tl.arange(0, WIDTH)
        parts = parts + (tl.load(row + e, mask=e < SIZE, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def load_offset(offset, CHANNELS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """A number a channel: the same for every part of a row, as each has whole bins."""
    e = tl.arange(0, WIDTH)
    return tl.load(offset + e % CHANNELS, mask=e < SIZE, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x, offset, weight, bias, lengths, keys, stats, out,
    frames, utterances, slope, threshold, scale, eps,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, REACH: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, DROPS: tl.constexpr, BIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS frames of the result, each from the frame that it repeats; offset may be None."""
    SIZE: tl.constexpr = BINS * CHANNELS
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    last = tl.maximum(length - 1, 0)
    c = tl.arange(0, BIN)
    padded = frames + 2 * REACH
    if offset is not None:
        added = load_offset(offset, CHANNELS, SIZE, WIDTH)
    w = load_parts(weight, SIZE, WIDTH, PARTS)
    shift = load_parts(bias, SIZE, WIDTH, PARTS)
    for k in range(ROWS):
        p = tl.program_id(0) * ROWS + k
        here = p < padded
        t = p - REACH
        t = tl.where(p < REACH, tl.minimum(REACH - p, last), t)
        t = tl.where(t >= length, tl.maximum(last - 1 - (t - length), 0), t)
        inside = here & (p < length + 2 * REACH) & (length > 0)
        row = b * frames + t
        values = ()
        total = tl.zeros((WIDTH,), tl.float32)
        for i in tl.static_range(PARTS):
            e = i * WIDTH + tl.arange(0, WIDTH)
            value = tl.load(x + row * SIZE + e, mask=(e < SIZE) & inside, other=0.0)
            value = value.to(tl.float32)
            if offset is not None:
                value += added
            values = values + (value,)
            total += value
        mean = tl.sum(total, axis=0) / SIZE
        squares = tl.zeros((WIDTH,), tl.float32)
        for i in tl.static_range(PARTS):
            centred = tl.where(i * WIDTH + tl.arange(0, WIDTH) < SIZE, values[i] - mean, 0.0)
            squares += centred * centred
        deviation = tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)
        own = inside & (p == t + REACH)
        tl.store(stats + row, mean, mask=own)
        tl.store(stats + utterances * frames + row, deviation, mask=own)
        numbers = (keys, mean, deviation, slope, threshold, scale)
        target = out + (b * padded + p) * ((BINS + 2 * REACH) * CHANNELS)
        for i in tl.static_range(PARTS):
            e = i * WIDTH + tl.arange(0, WIDTH)
            y = ending(values[i], row, e, w[i], shift[i], *numbers, SIZE, DROPS)
            y = tl.where(inside, y, 0.0).to(out.dtype.element_ty)
            tl.store(target + REACH * CHANNELS + e, y, mask=(e < SIZE) & here)
        # The bins that mirror others, a few: these are made again.
        for i in tl.static_range(REACH):
            for high in tl.static_range(2):
                bin = (BINS - 2 - i) if high else (i + 1)
                image = (REACH + BINS + i) if high else (REACH - 1 - i)
                e_bin = bin * CHANNELS + c
                inner = c < CHANNELS
                value = tl.load(x + row * SIZE + e_bin, mask=inner & inside, other=0.0)
                value = value.to(tl.float32)
                if offset is not None:
                    value += tl.load(offset + c, mask=inner, other=0.0).to(tl.float32)
                w_bin = tl.load(weight + e_bin, mask=inner, other=0.0).to(tl.float32)
                shift_bin = tl.load(bias + e_bin, mask=inner, other=0.0).to(tl.float32)
                y = ending(value, row, e_bin, w_bin, shift_bin, *numbers, SIZE, DROPS)
                y = tl.where(inside, y, 0.0).to(out.dtype.element_ty)
                tl.store(target + image * CHANNELS + c, y, mask=inner & here)


@triton.jit
def load_gradient(
    row, e, mask, wanted, BINS: tl.constexpr, CHANNELS: tl.constexpr, REACH: tl.constexpr
):
    """The gradient of a padded frame, of an element and its images; zero unless wanted."""
    g = tl.load(row + REACH * CHANNELS + e, mask=mask & wanted, other=0.0).to(tl.float32)
    if REACH > 0:
        f = e // CHANNELS
        mirrored = row + (e - 2 * CHANNELS * f)
        low = mask & wanted & (f >= 1) & (f <= REACH)
        g += tl.load(mirrored + REACH * CHANNELS, mask=low, other=0.0).to(tl.float32)
        high = mask & wanted & (f >= BINS - 1 - REACH) & (f <= BINS - 2)
        place: tl.constexpr = (REACH + 2 * BINS - 2) * CHANNELS
        g += tl.load(mirrored + place, mask=high, other=0.0).to(tl.float32)
    return g


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    x, offset, weight, bias, lengths, keys, stats, dout, dx, sums, doffsets,
    frames, utterances, slope, threshold, scale,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, REACH: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Every so-manieth frame's dx; sums (programs, 2, F C): the gradients of weight and bias.

    offset and doffsets (programs, the numbers of a part), its gradient over some bins, may be None.
    """
    SIZE: tl.constexpr = BINS * CHANNELS
    stride: tl.constexpr = (BINS + 2 * REACH) * CHANNELS
    if offset is not None:
        added = load_offset(offset, CHANNELS, SIZE, WIDTH)
        doffset = tl.zeros((WIDTH,), tl.float32)
    w = load_parts(weight, SIZE, WIDTH, PARTS)
    shift = load_parts(bias, SIZE, WIDTH, PARTS)
    dw = ()
    db = ()
    for _ in tl.static_range(PARTS):
        dw = dw + (tl.zeros((WIDTH,), tl.float32),)
        db = db + (tl.zeros((WIDTH,), tl.float32),)
    row = tl.program_id(0).to(tl.int64)
    rows = utterances * frames
    for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
        b = row // frames
        t = (row % frames).to(tl.int32)
        length = tl.load(lengths + b).to(tl.int32)
        last = tl.maximum(length - 1, 0)
        inside = t < length
        start = b * (frames + 2 * REACH)
        mean = tl.load(stats + row, mask=inside, other=0.0)
        deviation = tl.load(stats + utterances * frames + row, mask=inside, other=0.0)
        values = ()
        gradients = ()
        for i in tl.static_range(PARTS):  # all loads before what waits for them
            e = i * WIDTH + tl.arange(0, WIDTH)
            value = tl.load(x + row * SIZE + e, mask=(e < SIZE) & inside, other=0.0)
            g = load_gradient(
                dout + (start + t + REACH) * stride,
                *(e, e < SIZE, inside, BINS, CHANNELS, REACH),
            )
            for k in tl.static_range(REACH):
                before = inside & (tl.minimum(k + 1, last) == t)
                if before:
                    g += load_gradient(
                        dout + (start + REACH - 1 - k) * stride,
                        *(e, e < SIZE, before, BINS, CHANNELS, REACH),
                    )
                after = inside & (tl.maximum(last - 1 - k, 0) == t)
                if after:
                    g += load_gradient(
                        dout + (start + REACH + length + k) * stride,
                        *(e, e < SIZE, after, BINS, CHANNELS, REACH),
                    )
            value = value.to(tl.float32)
            if offset is not None:
                value += added
            values = values + (value,)
            gradients = gradients + (g,)
        total = tl.zeros((WIDTH,), tl.float32)
        along = tl.zeros((WIDTH,), tl.float32)
        normed = ()
        weighted = ()
        new_dw = ()
        new_db = ()
        for i in tl.static_range(PARTS):
            e = i * WIDTH + tl.arange(0, WIDTH)
            value = tl.where((e < SIZE) & inside, (values[i] - mean) * deviation, 0.0)
            g = gradients[i]
            if DROPS:
                g = tl.where(kept(keys, row, e, threshold, SIZE), g * scale, 0.0)
            g = tl.where(value * w[i] + shift[i] > 0, g, g * slope)
            new_dw = new_dw + (dw[i] + g * value,)
            new_db = new_db + (db[i] + g,)
            g = g * w[i]
            along += g * value
            total += g
            normed = normed + (value,)
            weighted = weighted + (g,)
        dw = new_dw
        db = new_db
        share = tl.sum(along, axis=0) / SIZE
        shared = tl.sum(total, axis=0) / SIZE
        for i in tl.static_range(PARTS):
            e = i * WIDTH + tl.arange(0, WIDTH)
            g = (weighted[i] - shared - normed[i] * share) * deviation
            tl.store(dx + row * SIZE + e, g.to(dx.dtype.element_ty), mask=e < SIZE)
            if offset is not None:
                doffset += g
        row += tl.num_programs(0)
    to = sums + tl.program_id(0).to(tl.int64) * (2 * SIZE)
    for i in tl.static_range(PARTS):
        e = i * WIDTH + tl.arange(0, WIDTH)
        tl.store(to + e, dw[i], mask=e < SIZE)
        tl.store(to + SIZE + e, db[i], mask=e < SIZE)
    if offset is not None:
        e = tl.arange(0, WIDTH)
        numbers: tl.constexpr = min(WIDTH, SIZE)
        tl.store(doffsets + tl.program_id(0) * numbers + e, doffset, mask=e < SIZE)


@triton.jit(do_not_specialize=["frames", "outputs"])
def patches_kernel(
    x, lengths, out, frames, outputs,
    BINS: tl.constexpr, REACH: tl.constexpr, STRIDE: tl.constexpr, PLACES: tl.constexpr,
    COLUMNS: tl.constexpr, TIME: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS frames of the result, each PLACES patches of TIME frames times WIDE bins, then ones."""
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    last = tl.maximum(length - 1, 0)
    e = tl.arange(0, WIDTH)
    column = e % COLUMNS
    of_patch = column < TIME * WIDE
    bin = tl.abs(e // COLUMNS * STRIDE + column % WIDE - REACH)
    bin = tl.where(bin >= BINS, 2 * BINS - 2 - bin, bin)
    for k in range(ROWS):
        row = tl.program_id(0) * ROWS + k
        here = (e < PLACES * COLUMNS) & (row < outputs)
        p = row * STRIDE + column // WIDE
        t = p - REACH
        t = tl.where(p < REACH, tl.minimum(REACH - p, last), t)
        t = tl.where(t >= length, tl.maximum(last - 1 - (t - length), 0), t)
        inside = here & of_patch & (p < length + 2 * REACH) & (length > 0)
        value = tl.load(x + (b * frames + t) * BINS + bin, mask=inside, other=0.0)
        value = tl.where(of_patch, value.to(tl.float32), 1.0).to(out.dtype.element_ty)
        tl.store(out + (b * outputs + row) * (PLACES * COLUMNS) + e, value, mask=here)
