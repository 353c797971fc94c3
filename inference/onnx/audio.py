"""Recordings -> samples at the model's rate, in numpy; `inference.audio` is PyTorch's."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from inference.decode import open_file
from inference.recording import Recording, checked
from modules.errors import UserError

WIDTH, ROLLOFF = 6, 0.99  # of the filter: zero crossings, and its edge under half the lower rate


def open_audio(audio, sample_rate=None):
    """A path, or a 1-D array of `sample_rate` Hz -> Recording; integers are scaled."""
    if isinstance(audio, str | Path):
        return Recording(str(audio), *open_file(audio))
    x = np.asarray(audio)
    if not sample_rate or x.ndim != 1:
        raise UserError(
            f"audio of shape {x.shape} and sample_rate={sample_rate}: give a 1-D array and its rate"
        )
    if x.dtype in (np.int16, np.int32):
        x = x / (np.iinfo(x.dtype).max + 1)
    elif x.dtype.kind != "f":
        raise UserError(f"audio of {x.dtype} is unknown; give floats in [-1, 1], int16 or int32")
    x = x.astype(np.float32)
    return Recording("the array", int(sample_rate), len(x) / sample_rate, lambda: iter([x]))


def read(recording, target_rate):
    """Yield a recording's samples at `target_rate` Hz; UserError as of `checked`."""
    return checked(recording, target_rate, resampled, np.isfinite)


def resampled(blocks, rate, target_rate):
    """Blocks (N,) at `rate` -> the same sound at `target_rate`, whatever the blocks.

    The ratio is one of numbers up to 1000, as in `inference.audio`.
    """
    ratio = Fraction(target_rate, rate).limit_denominator(1000)
    if ratio == 1:
        yield from blocks
        return
    new, old = ratio.numerator, ratio.denominator
    kernels, width = sinc_kernels(new, old)
    held, heard, given = np.zeros(width, dtype=np.float32), 0, 0
    for block in blocks:
        heard += len(block)
        held = np.concatenate([held, block])
        steps = max(0, (len(held) - kernels.shape[1]) // old + 1)
        yield convolved(held, steps, kernels, old)
        held, given = held[steps * old :], given + steps * new
    left = -(-heard * new // old) - given
    held = np.concatenate([held, np.zeros(width + old + kernels.shape[1], dtype=np.float32)])
    yield convolved(held, -(-left // new), kernels, old)[:left]


def convolved(x, steps, kernels, old):
    """All `new` phases of the filter at every `old` samples of x (N,) -> (steps x new,)."""
    if steps == 0:
        return np.zeros(0, dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, kernels.shape[1])[::old][:steps]
    return (windows @ kernels.T).reshape(-1)


def sinc_kernels(new, old):
    """Windowed sinc filters, a row a phase: (new, 2 width + old), width.

    With torchaudio's defaults: a Hann window over WIDTH zero crossings.
    """
    edge = min(new, old) * ROLLOFF
    width = -int(-WIDTH * old // edge)
    time = np.arange(-width, width + old) / old - np.arange(new)[:, None] / new
    time = np.clip(time * edge, -WIDTH, WIDTH)
    window = np.cos(time * np.pi / WIDTH / 2) ** 2
    return (np.sinc(time) * window * edge / old).astype(np.float32), width
