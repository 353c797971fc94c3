"""Triton kernel of the frontend's whole first block, for results without gradients."""

import triton
import triton.language as tl

from modules.ops.products import dot


@triton.jit
def repeated(p, length, REACH: tl.constexpr):
    """Which of an utterance's frames stands at place p of the frames reflected at its ends."""
    last = tl.maximum(length - 1, 0)
    t = tl.where(p < REACH, tl.minimum(REACH - p, last), p - REACH)
    return tl.where(t >= length, tl.maximum(last - 1 - (t - length), 0), t)


@triton.jit(do_not_specialize=["frames", "outputs"])
def block_kernel(
    x, lengths, taps, weight, bias, out, frames, outputs, slope, eps,
    BINS: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr,
    TIME: tl.constexpr, WIDE: tl.constexpr, EDGE: tl.constexpr, COLUMNS: tl.constexpr,
    REACH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS frames of the result: each one's patches by the taps, its norm, activation, images.

    x (B, T, BINS) -> out (B, outputs + 2 REACH, PLACES + 2 REACH, CHANNELS); taps (CHANNELS,
    COLUMNS), of which one is the bias; EDGE: how many frames and bins are reflected before.
    """
    b = tl.program_id(1).to(tl.int64)
    heard = tl.load(lengths + b).to(tl.int32)
    length = tl.where(heard > 0, (heard - 1) // STRIDE + 1, 0)
    place = tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    channel = tl.arange(0, CHANNELS)
    there = (place < PLACES)[:, None]
    of_patch = column < TIME * WIDE
    by = tl.load(taps + channel[None, :] * COLUMNS + column[:, None])
    e = place[:, None] * CHANNELS + channel[None, :]
    w = tl.load(weight + e, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + e, mask=there, other=0.0).to(tl.float32)
    bin = tl.abs(place[:, None] * STRIDE + (column % WIDE)[None, :] - EDGE)
    bin = tl.where(bin >= BINS, 2 * BINS - 2 - bin, bin)
    inner = tl.broadcast_to(channel[None, :], (TILE, CHANNELS))
    SIZE: tl.constexpr = PLACES * CHANNELS
    padded = outputs + 2 * REACH
    for k in range(ROWS):
        p = tl.program_id(0) * ROWS + k
        here = p < padded
        inside = here & (p < length + 2 * REACH) & (length > 0)
        q = repeated(p, length, REACH) * STRIDE + column // WIDE
        s = repeated(q, heard, EDGE)
        read = inside & of_patch & (q < heard + 2 * EDGE)
        row = x + b * frames * BINS
        patch = tl.load(row + s[None, :] * BINS + bin, mask=there & read[None, :], other=0.0)
        patch = tl.where(of_patch[None, :], patch.to(tl.float32), 1.0).to(taps.dtype.element_ty)
        z = dot(patch, by, tl.zeros((TILE, CHANNELS), tl.float32))
        z = tl.where(there, z, 0.0)
        mean = tl.sum(tl.sum(z, axis=1), axis=0) / SIZE
        centred = tl.where(there, z - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / SIZE + eps)
        y = centred * deviation * w + shift
        y = tl.where(y > 0, y, y * slope)
        y = tl.where(inside, y, 0.0).to(out.dtype.element_ty)
        target = out + (b * padded + p) * ((PLACES + 2 * REACH) * CHANNELS)
        tl.store(target + REACH * CHANNELS + e, y, mask=there & here)
        for i in tl.static_range(REACH):  # bins that are reflected at the edges
            low = (place == i + 1)[:, None] & here
            high = (place == PLACES - 2 - i)[:, None] & here
            tl.store(target + (REACH - 1 - i) * CHANNELS + inner, y, mask=low)
            tl.store(target + (REACH + PLACES + i) * CHANNELS + inner, y, mask=high)
