"""From eSpeak's clean samples to recordings: pace, noise, room, microphone, band limit and level.

All that is linear after the noise is one product of spectra, resampling to 16 kHz included, so
that a recording costs three Fourier transforms.
"""

import bisect
import functools
import math
import random
from dataclasses import dataclass

import numpy as np

from demo import espeak
from demo.readers import draw_readers
from demo.sentences import sentence
from modules.errors import UserError

SAMPLE_RATE = 16000
KNOTS = np.geomspace(80, 11025, 9)  # Hz, where a random frequency response is drawn
SECONDS_OF_NOISE = 40
PASSBANDS = [(0, 3400), (0, 4000), (300, 3400), (200, 3800), (0, 5500), (100, 7000)]  # Hz


@dataclass(frozen=True)
class Conditions:
    """Shares of the utterances with noise, a room, a band limit; snr: lowest and highest, in dB."""

    noise: float = 0.7
    reverb: float = 0.5
    band_limit: float = 0.2
    snr: tuple[float, float] = (5.0, 40.0)

    def check(self):
        """UserError for what cannot be meant."""
        for name in ("noise", "reverb", "band_limit"):
            check_share(name, getattr(self, name))
        if not -math.inf < self.snr[0] <= self.snr[1] < math.inf:
            raise UserError(f"snr={self.snr}: expected two numbers in dB, the lower ratio first")


def check_share(name, share):
    """UserError for what is no share of all."""
    if not 0 <= share <= 1:
        raise UserError(f"{name}={share} is a share of all, so between 0 and 1")


class Place:
    """Where and with what a reader is recorded: a room and a microphone that stay the same."""

    def __init__(self, seed, rate):
        self.rate = rate
        rng = np.random.default_rng(seed)
        self.room = _room(rng, rate)
        self.microphone = rng.normal(0, 5, len(KNOTS))  # dB

    def record(self, speech, size, conditions, rng):
        """Speech (n,) at the place's rate -> its recording (m,) at 16 kHz, peak below 1."""
        x = _change_pace(np.pad(speech, rng.integers(0.05 * self.rate, 0.4 * self.rate, 2)), rng)
        if rng.random() < conditions.noise:
            noise = _noise(len(x), rng)
            decibels = rng.uniform(*conditions.snr)
            loudness = np.sqrt(np.mean(speech**2) / np.mean(noise**2))
            x += noise * np.float32(loudness * 10 ** (-decibels / 20))
        points = _fast_length(len(x) + len(self.room))
        out_points = _fast_length(points * SAMPLE_RATE / self.rate * size)
        spectrum = np.fft.rfft(x, points)
        spectrum *= self._response(points, conditions.band_limit, rng)
        if rng.random() < conditions.reverb:
            spectrum *= np.fft.rfft(self.room, points)
        spectrum = spectrum[: out_points // 2 + 1]
        # irfft pads with zeros: a large size leaves nothing above what eSpeak gave.
        recording = np.fft.irfft(spectrum, out_points)[: round(len(x) * out_points / points)]
        recording /= np.abs(recording).max()
        if rng.random() < 0.15:  # a compressor, or an overdriven preamplifier
            drive = rng.uniform(1, 6)
            recording = np.tanh(drive * recording) / np.tanh(drive)
        return (recording * 10 ** (rng.uniform(-25, -0.5) / 20)).astype(np.float32)

    def _response(self, points, band_limit, rng):
        """Gains (points // 2 + 1,): the microphone, a bit different each time, and a band limit."""
        grid = np.geomspace(80, self.rate / 2, 100)
        decibels = self.microphone + rng.normal(0, 2, len(KNOTS))
        decibels = _smooth(np.interp(np.log(grid), np.log(KNOTS), decibels), 9)
        gains = 10 ** (decibels / 20)
        if rng.random() < band_limit:
            low, high = PASSBANDS[rng.integers(len(PASSBANDS))]
            order = rng.integers(8, 40)
            gains /= np.sqrt(1 + (grid / high) ** order)
            if low:
                gains /= np.sqrt(1 + (low / grid) ** (order / 4))
        frequencies = np.fft.rfftfreq(points, 1 / self.rate)
        return np.interp(frequencies, grid, gains).astype(np.float32)


def _room(rng, rate):
    """An impulse response: the direct sound, a few reflections and a tail that dies away."""
    decay = rng.uniform(0.1, 0.7)  # seconds to -60 dB
    t = np.arange(round(decay * rate)) / rate
    tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / decay)
    tail[t < rng.uniform(0.005, 0.03)] = 0
    tail = _smooth(tail, rng.integers(1, 6))  # walls swallow the treble
    for delay in rng.uniform(0.002, 0.04, rng.integers(2, 9)):
        tail[round(delay * rate)] += rng.choice([-1, 1]) * np.abs(tail).max() * rng.uniform(0.5, 3)
    tail *= 10 ** (-rng.uniform(0, 18) / 20) / np.sqrt(np.sum(tail**2))  # direct to reverberant
    tail[0] = 1
    return tail.astype(np.float32)


def _change_pace(x, rng):
    """Speed up and slow down within the utterance, and melody with it, as nothing of eSpeak's is
    uneven by itself."""
    knots = rng.normal(1, 0.06, len(x) // 6000 + 2).clip(0.8, 1.2)
    fine = np.linspace(0, len(knots) - 1, len(x) // 200 + 2)
    speed = _smooth(np.interp(fine, np.arange(len(knots)), knots), 9)
    position = np.concatenate([[0], np.cumsum(speed)])
    position *= (len(x) - 1) / position[-1]
    where = np.interp(np.linspace(0, len(position) - 1, len(x)), np.arange(len(position)), position)
    return np.interp(where, np.arange(len(x)), x).astype(np.float32)


def _noise(count, rng):
    """Noise (count,): coloured, two colours mixed, or babble of three to eight voices."""
    if rng.random() < 0.3:
        track = babble()
        return sum(_slice(track, count, rng) for _ in range(rng.integers(3, 9)))
    first, second = rng.choice(len(colours()), 2)
    share = np.float32(rng.uniform(0, 1))
    return share * _slice(colours()[first], count, rng) + _slice(colours()[second], count, rng)


def _slice(track, count, rng):
    start = rng.integers(len(track))
    repeats = (start + count) // len(track)
    if not repeats:
        return track[start : start + count]
    return np.concatenate([track] * (repeats + 1))[start : start + count]


@functools.cache
def colours():
    """Loops of noise whose power falls by 0, 3, 6 and 9 dB an octave; the same in every process."""
    rng = np.random.default_rng(1)
    points = _fast_length(SECONDS_OF_NOISE * espeak.start().sample_rate)
    spectrum = np.fft.rfft(rng.standard_normal(points))
    falls = np.maximum(np.arange(len(spectrum)), 50 * SECONDS_OF_NOISE)  # level below 50 Hz
    tracks = [np.fft.irfft(spectrum / falls ** (slope / 2), points) for slope in range(4)]
    return [(track / track.std()).astype(np.float32) for track in tracks]


@functools.cache
def babble():
    """A loop of many voices one after the other; the same text and voices in every process."""
    rng = random.Random(1)
    said = []
    for reader in draw_readers(rng, 30, first_id=0, foreign=0):
        reader.set_voice()
        said.append(espeak.start().say(sentence(rng, digit_fraction=0).lower()))
    return np.concatenate([samples / samples.std() for samples in said]).astype(np.float32)


def _smooth(x, width):
    return np.convolve(x, np.ones(width) / width, mode="same")


@functools.cache
def _fast_lengths():
    """Even numbers below 2**24 without prime factors above 7: their Fourier transforms are fast."""
    lengths = {2}
    for factor in (2, 3, 5, 7):
        for power in range(1, 24):
            lengths |= {n * factor**power for n in lengths if n * factor**power < 2**24}
    return sorted(lengths)


def _fast_length(least):
    return _fast_lengths()[bisect.bisect_left(_fast_lengths(), least)]
