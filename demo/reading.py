"""A reader's chapter: say every text, record it, and put the folder in its place when complete."""

from dataclasses import dataclass

import numpy as np

from demo import espeak
from demo.accents import pronounce
from demo.acoustics import SAMPLE_RATE, Conditions, Place, babble
from demo.readers import Reader
from demo.split import write_chapter
from demo.texts import punctuate


@dataclass(frozen=True)
class Chapter:
    """Some of what a reader says. `apart`: word by word, as numbers are dictated."""

    folder: str
    number: int
    reader: Reader
    texts: tuple[str, ...]
    conditions: Conditions
    apart: bool

    @property
    def count(self):
        return len(self.texts)


def read_chapter(chapter):
    """Write the FLAC files and the transcript of a chapter; returns seconds of speech."""
    return write_chapter(chapter, zip(chapter.texts, recordings(chapter), strict=True), SAMPLE_RATE)


def recordings(chapter):
    """Yield every text of a chapter, spoken and recorded: samples at 16 kHz, float32."""
    reader, voice = chapter.reader, espeak.start()
    if chapter.conditions.noise:
        babble()  # now: to make it, eSpeak takes other voices
    reader.set_voice()
    place = Place(reader.seed, voice.sample_rate)
    rng = np.random.default_rng([reader.seed, chapter.number])
    for text in chapter.texts:
        speech = _dictate(text, reader, rng) if chapter.apart else _read(text, reader, rng)
        size = reader.size * rng.uniform(0.98, 1.02)
        yield place.record(speech, size, chapter.conditions, rng)


def _read(text, reader, rng):
    espeak.start().set_style(
        round(reader.rate * rng.uniform(0.92, 1.08)),
        round(np.clip(reader.pitch + rng.normal(0, 4), 0, 99)),
        reader.pitch_range,
        reader.gap,
    )
    text = punctuate(text, rng)  # in lower case: capitals would be spelt as abbreviations
    if reader.rules:
        # Of an interjection such as "h" an accent may leave nothing.
        text = pronounce(espeak.start().phonemes(text), reader.rules) or text
    return espeak.start().say(text)


def _dictate(text, reader, rng):
    """Groups of one to three words (mostly one), 60 to 200 ms apart, each of its own loudness."""
    words, parts = text.split(), []
    while words:
        size = rng.choice([1, 1, 1, 2, 3])
        group, words = " ".join(words[:size]), words[size:]
        spoken = _trim(_read(group, reader, rng), rng)
        parts.append(spoken * np.float32(10 ** (rng.normal(0, 2) / 20)))
        if words:
            pause = rng.uniform(0.06, 0.2) * espeak.start().sample_rate
            parts.append(np.zeros(round(pause), np.float32))
    return np.concatenate(parts)


def _trim(speech, rng):
    """Cut off what is before and after a word, and of weak consonants some, as recorders do."""
    loud = np.flatnonzero(np.abs(speech) > rng.uniform(0.01, 0.15) * np.abs(speech).max())
    return speech[loud[0] : loud[-1] + 1]
