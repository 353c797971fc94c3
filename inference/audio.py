"""Recordings of any rate and channel count -> mono float32 at the model's rate, block by block."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import resample

from inference.decode import open_file
from inference.recording import Recording, checked
from modules.errors import UserError

BLOCK = 10  # s that are resampled at a time, unless a stream wants less


def open_audio(audio, sample_rate=None):
    """A path, or a 1-D array or tensor of `sample_rate` Hz -> Recording.

    Channels of a file are averaged. Integers are scaled by their type's range.
    UserError for what cannot be used; what is found only when reading is raised by `read`.
    """
    if isinstance(audio, str | Path):
        rate, seconds, blocks = open_file(audio)
        return Recording(str(audio), rate, seconds, lambda: map(torch.from_numpy, blocks()))
    x = from_array(audio, sample_rate)
    blocks = x.split(BLOCK * int(sample_rate)) if len(x) else ()
    return Recording("the array", int(sample_rate), len(x) / sample_rate, lambda: iter(blocks))


def read(recording, target_rate):
    """Yield a recording's samples at `target_rate` Hz; UserError as of `checked`."""
    return checked(recording, target_rate, resampled, torch.isfinite)


def resampled(blocks, rate, target_rate, seconds=BLOCK):
    """Blocks (N,) at `rate` -> the same sound at `target_rate`, as if it were one block.

    seconds: what is resampled at a time, the delay of a stream.
    """
    resampler = Resampler(rate, target_rate, seconds)
    for block in blocks:
        yield from resampler.push(block)
    yield from resampler.finish()


class Resampler:
    """Blocks of sound at `rate` as they come -> the same sound at `target_rate`.

    Each block is resampled with what stands before and after it, as far as the filter reaches. The
    ratio is one of numbers up to 1000: exact for all usual rates, wrong by 0.05 % at most (from
    16,001 Hz to 16,000 by 0.006 %).
    """

    def __init__(self, rate, target_rate, seconds=BLOCK):
        ratio = Fraction(target_rate, rate).limit_denominator(1000)
        self.new, self.old = new, old = ratio.numerator, ratio.denominator
        # torchaudio's filter reaches 6 / 0.99
        self.context = int(-(-10 * max(1.0, old / new) // old) * old)
        self.size = max(self.context, old * -(-int(seconds * rate) // old))
        self.before, self.buffer = torch.zeros(0), torch.zeros(0)

    def push(self, block):
        """Yield what a block (N,) completes, in pieces."""
        if self.new == self.old:
            yield block
            return
        self.buffer = torch.cat([self.buffer, block])
        while len(self.buffer) >= self.size + self.context:
            length = self.size // self.old * self.new
            yield self._resample(self.buffer[: self.size + self.context])[:length]
            self.before = self.buffer[self.size - self.context : self.size]
            self.buffer = self.buffer[self.size :]

    def finish(self):
        """Yield the rest: the sound ends here."""
        if len(self.buffer):
            yield self._resample(self.buffer)

    def _resample(self, x):
        """x (N,) after what came before it -> as much at the target rate."""
        y = resample(torch.cat([self.before, x]), self.old, self.new)
        return y[len(self.before) // self.old * self.new :]


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
