"""Triton kernels from waveforms to log-mel features, around a Fourier transform."""

import triton
import triton.language as tl

SIZES = ["samples", "frames", "numbers"]  # which change from batch to batch
DECIBELS = tl.constexpr(3.0102999566398120)  # 10 log10(2)
NAN = tl.constexpr(tl.PropagateNan.ALL)  # a batch of wrong numbers is found by them


@triton.jit(do_not_specialize=SIZES)
def frames_kernel(
    wavs, window, out, samples, frames,
    HOP: tl.constexpr, REACH: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS windowed frames of an utterance: (B, N) -> (B T, POINTS)."""
    b = tl.program_id(1).to(tl.int64)
    point = tl.arange(0, WIDTH)
    inside = point < POINTS
    w = tl.load(window + point, mask=inside, other=0.0)
    for k in range(ROWS):
        t = tl.program_id(0) * ROWS + k
        sample = t * HOP + point - REACH
        there = inside & (sample >= 0) & (sample < samples)
        x = tl.load(wavs + b * samples + sample, mask=there, other=0.0).to(tl.float32)
        tl.store(out + (b * frames + t) * POINTS + point, x * w, mask=inside & (t < frames))


@triton.jit(do_not_specialize=SIZES)
def mel_kernel(
    spectra, firsts, weights, lengths, out, loudest, frames, amin,
    BINS: tl.constexpr, MELS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, LIMITS: tl.constexpr,
):  # fmt: skip
    """ROWS frames of an utterance: spectra (B T, BINS) -> out (B, T, MELS), loudest (B,).

    A complex number is an int64, of which both halves come in one load.

    Each of a filter's few bins is read where it is needed: a bin is in two filters, and from the
    second reading on in the cache. As a product with all bins it would be 40 times the work.
    """
    b = tl.program_id(1).to(tl.int64)
    # Filters first: Triton has neighbouring threads take what it reads in this order, and bins of a
    # frame lie beside each other.
    m = tl.arange(0, WIDTH)[:, None]
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    row = spectra + (b * frames + t) * BINS
    first = tl.load(firsts + m, mask=m < MELS, other=0)
    power = tl.zeros((WIDTH, ROWS), tl.float32)
    for tap in range(TAPS):
        weight = tl.load(weights + tap * MELS + m, mask=m < MELS, other=0.0)
        there = (t < frames) & (weight != 0.0)
        both = tl.load(row + (first + tap), mask=there, other=0)
        real = both.to(tl.int32).to(tl.float32, bitcast=True)
        imaginary = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        power += (real * real + imaginary * imaginary) * weight
    x = DECIBELS * tl.log2(tl.maximum(power, amin, propagate_nan=NAN))
    stored = (t < frames) & (m < MELS)
    if lengths is not None:
        valid = stored & (t < tl.load(lengths + b))
        if LIMITS:
            own = tl.where(valid & (x == x), x, float("-inf"))  # NaN stays in its own frames
            own = tl.max(tl.max(own, axis=1), axis=0)
            tl.atomic_max(loudest + b, own, sem="relaxed")
        x = tl.where(valid, x, 0.0)
    tl.store(out + (b * frames + t) * MELS + m, x, mask=stored)


@triton.jit(do_not_specialize=SIZES)
def limit_kernel(
    x, lengths, loudest, numbers, top_db, MELS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Raise an utterance's features (T MELS,) to within top_db of its loudest, in place."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = i < tl.minimum(tl.load(lengths + b) * MELS, numbers)
    at = x + b * numbers + i
    floor = tl.load(loudest + b) - top_db
    y = tl.maximum(tl.load(at, mask=valid, other=0.0), floor, propagate_nan=NAN)
    tl.store(at, y, mask=valid)
