"""Who reads a synthesised corpus: hundreds of voices, each with habits, a room and a microphone."""

import random
from dataclasses import dataclass

from demo import espeak
from demo.accents import ACCENTS, REGIONAL, draw_rules

ENGLISH = ["en-us", "en-us", "en-us", *REGIONAL]
# Variants that nobody would take for a human.
ROBOTS = ("robosoft", "Robot", "Demonic", "whisper", "fast", "Tweaky", "Storm", "Mr serious")


@dataclass(frozen=True)
class Reader:
    """`accent` and `variant` are eSpeak's; `foreign` names what `rules` were drawn from.

    rate in words a minute, pitch and pitch_range 0 to 100, gap between words in 10 ms; size is
    that of the vocal tract and larynx, 1 being eSpeak's own; seed draws room and microphone.
    """

    id: int
    accent: str
    variant: str
    foreign: str
    rules: tuple[tuple[str, str], ...]
    rate: int
    pitch: int
    pitch_range: int
    gap: int
    size: float
    seed: int

    def set_voice(self):
        """Make this process's eSpeak speak with this voice."""
        espeak.start().set_voice(
            self.accent, self.variant, self.rate, self.pitch, self.pitch_range, self.gap
        )


def draw_readers(rng, count, first_id, foreign):
    """`count` readers, of whom a share of `foreign` is; every variant comes up before any again."""
    variants = sorted(
        name for name in espeak.start().variants if not any(robot in name for robot in ROBOTS)
    )
    order = []
    while len(order) < count:
        order += rng.sample(variants, len(variants))
    return [_draw(rng, first_id + i, order[i], foreign) for i in range(count)]


def _draw(rng: random.Random, number, variant, foreign):
    languages = [name for name in ACCENTS if name != "native"]
    name = rng.choice(languages) if rng.random() < foreign else "native"
    return Reader(
        id=number,
        accent=rng.choice(ENGLISH) if name == "native" else "en-us",
        variant=variant,
        foreign=name,
        rules=draw_rules(rng, name),
        rate=rng.randint(125, 225),
        pitch=rng.randint(20, 80),
        pitch_range=rng.randint(20, 90),
        gap=rng.choice([0, 0, 0, 1, 2, 4]),
        size=round(rng.uniform(0.87, 1.15), 3),
        seed=rng.randrange(2**32),
    )
