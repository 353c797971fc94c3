"""Recordings of any rate and channel count -> mono float32 at the model's rate, block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import resample

from inference.decode import open_file
from modules.errors import UserError

BLOCK = 10  # s that are resampled at a time, unless a stream wants less


@dataclass(frozen=True)
class Recording:
    """Audio that is not read yet.

    name : for messages
    rate : Hz
    seconds : its length as far as it is known beforehand, or None
    blocks : a function of nothing; yields the samples, each time from the start, (N,) float32
    """

    name: str
    rate: int
    seconds: float | None
    blocks: Callable[[], Iterator[torch.Tensor]]


def open_audio(audio, sample_rate=None):
    """A path, or a 1-D array or tensor of `sample_rate` Hz -> Recording.

    Channels of a file are averaged. Integers are scaled by their type's range.
    UserError for what cannot be used; what is found only when reading is raised by `read`.
    """
    if isinstance(audio, str | Path):
        return Recording(str(audio), *open_file(audio))
    x = from_array(audio, sample_rate)
    blocks = x.split(BLOCK * int(sample_rate)) if len(x) else ()
    return Recording("the array", int(sample_rate), len(x) / sample_rate, lambda: iter(blocks))


def read(recording, target_rate):
    """Yield a recording's samples at `target_rate` Hz, in blocks (N,) float32.

    UserError when it is damaged, empty or not finite.
    """
    if not 100 <= recording.rate <= 1_000_000:
        raise UserError(f"{recording.name} has {recording.rate} samples a second; give sound")
    empty = True
    for block in resampled(recording.blocks(), recording.rate, target_rate):
        if not torch.isfinite(block).all():
            raise UserError(f"{recording.name} holds samples that are not finite; give finite ones")
        empty = empty and not len(block)
        yield block
    if empty:
        raise UserError(f"{recording.name} holds no samples; give audio that is not empty")


def resampled(blocks, rate, target_rate, seconds=BLOCK):
    """Blocks (N,) at `rate` -> the same sound at `target_rate`, as if it were one block.

    Each block is resampled with what stands before and after it, as far as the filter reaches. The
    ratio is one of numbers up to 1000: exact for all usual rates, else wrong by a few millionths.
    seconds: what is resampled at a time, the delay of a stream.
    """
    ratio = Fraction(target_rate, rate).limit_denominator(1000)
    if ratio == 1:
        yield from blocks
        return
    new, old = ratio.numerator, ratio.denominator
    context = -(-10 * max(1.0, old / new) // old) * old  # torchaudio's filter reaches 6 / 0.99
    context = int(context)
    size = max(context, old * -(-int(seconds * rate) // old))
    before, buffer = torch.zeros(0), torch.zeros(0)
    for block in blocks:
        buffer = torch.cat([buffer, block])
        while len(buffer) >= size + context:
            x = resample(torch.cat([before, buffer[: size + context]]), old, new)
            skip = len(before) // old * new
            yield x[skip : skip + size // old * new]
            before, buffer = buffer[size - context : size], buffer[size:]
    if len(buffer):
        x = resample(torch.cat([before, buffer]), old, new)
        yield x[len(before) // old * new :]


def from_array(audio, sample_rate):
    """A 1-D array or tensor -> (N,) float32."""
    if sample_rate is None or int(sample_rate) != sample_rate or sample_rate <= 0:
        raise UserError(
            f"sample_rate={sample_rate} is not the rate of an array in Hz; give sample_rate=16000, "
            "for instance"
        )
    x = audio.detach().cpu() if isinstance(audio, torch.Tensor) else as_tensor(audio)
    if x.dim() != 1:
        raise UserError(
            f"audio of shape {tuple(x.shape)} is not one channel of samples; give a 1-D array, the "
            "mean over channels for instance"
        )
    if x.dtype.is_floating_point:
        return x.float()
    if x.dtype not in (torch.int16, torch.int32):
        raise UserError(f"audio of {x.dtype} is unknown; give floats in [-1, 1], int16 or int32")
    return x.float() / (torch.iinfo(x.dtype).max + 1)


def as_tensor(audio):
    """A numpy array -> a tensor; UserError when it is no numbers."""
    if not isinstance(audio, np.ndarray):
        raise UserError(f"audio of type {type(audio).__name__} is unknown; give a path or an array")
    try:
        # Writable, or PyTorch warns: of np.frombuffer it is not.
        return torch.from_numpy(np.require(audio, requirements=["C", "W"]))
    except TypeError as error:
        raise UserError(f"audio of {audio.dtype} is unknown ({error})") from None
