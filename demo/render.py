"""One chapter of the demo corpus: synthesise, resample, add noise, write FLAC and transcript."""

from dataclasses import dataclass

import numpy as np
import torch
import torchaudio

from demo import espeak
from demo.speakers import Speaker
from demo.split import write_chapter

SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Chapter:
    """All that one speaker says. `snr` is the lowest and highest ratio in dB; None: no noise."""

    folder: str
    speaker: Speaker
    texts: tuple[str, ...]
    snr: tuple[float, float] | None
    seed: int


def render(chapter):
    """Write the FLAC files and the transcript of a chapter; returns seconds of speech."""
    voice = espeak.start()
    rng = np.random.default_rng(chapter.seed)
    who = chapter.speaker
    voice.set_voice(who.accent, who.variant, who.rate, who.pitch, who.pitch_range)
    return write_chapter(chapter, _spoken(chapter, voice, rng), SAMPLE_RATE)


def _spoken(chapter, voice, rng):
    for text in chapter.texts:
        # In capitals eSpeak would spell out some words as abbreviations.
        samples = torch.from_numpy(voice.say(text.lower()))
        samples = torchaudio.functional.resample(samples, voice.sample_rate, SAMPLE_RATE)
        yield text, _record(samples.numpy(), chapter.snr, rng)


def _record(speech, snr, rng):
    """Pauses, noise and a random level, as a recording has them: (n,) -> (m,), peak below 1."""
    before, after = rng.integers(800, 4000, 2)  # 50 to 250 ms
    speech = np.pad(speech, (before, after))
    if snr is not None:
        noise = rng.standard_normal(len(speech))
        if rng.random() < 0.5:  # half of the rooms hum rather than hiss
            noise = np.convolve(noise, np.ones(8), mode="same")
        ratio = 10 ** (rng.uniform(*snr) / 20)
        speech = speech + noise * speech.std() / (noise.std() * ratio)
    level = 10 ** (rng.uniform(-20, -1) / 20)
    return (level * speech / np.abs(speech).max()).astype(np.float32)
