"""Audio that is not read yet, whatever its samples are held in, and what of it can be heard."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modules.errors import UserError


class EmptyAudioError(UserError):
    """A recording without a single sample."""


@dataclass(frozen=True)
class Recording:
    """Audio that is not read yet.

    name : for messages
    rate : Hz
    seconds : its length as far as it is known beforehand, or None
    blocks : a function of nothing; yields the samples, each time from the start, (N,) float32,
        tensors or arrays
    """

    name: str
    rate: int
    seconds: float | None
    blocks: Callable[[], Iterator[Any]]


def checked(recording, target_rate, resampled, finite):
    """Yield a recording's samples at `target_rate` Hz, in blocks (N,) float32.

    resampled(blocks, rate, target_rate) -> blocks; finite(block) -> whether all of it is.
    UserError when it is damaged, empty or not finite.
    """
    if not 100 <= recording.rate <= 1_000_000:
        raise UserError(f"{recording.name} has {recording.rate} samples a second; give sound")
    empty = True
    for block in resampled(recording.blocks(), recording.rate, target_rate):
        if not finite(block).all():
            raise UserError(f"{recording.name} holds samples that are not finite; give finite ones")
        empty = empty and not len(block)
        yield block
    if empty:
        raise EmptyAudioError(f"{recording.name} holds no samples; give audio that is not empty")
