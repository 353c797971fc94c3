"""Who speaks in the demo corpus: accent, voice variant, pitch and rate make a speaker."""

from dataclasses import dataclass

from demo.accents import REGIONAL

ACCENTS = ["en", "en-us", *REGIONAL]

# A variant is the timbre. None is in two splits, while all splits share the accents:
# the test voices are new, but not foreign.
VARIANTS = {
    "train-clean-100": (
        "f1 f2 f4 m1 m2 m3 m4 m6 m7 adam Alex Andy Annie aunty belinda benjamin boris david Denis "
        "edward grandma grandpa Lee Alicia Michael norbert quincy robert steph travis victor zac"
    ),
    "dev-clean": "f3 m5 max shelby paul steph2",
    "test-clean": "f5 m8 rob linda john miguel",
    "test-other": "klatt klatt4 croak Reed Gene Andrea",
}

FIRST_ID = {"train-clean-100": 1000, "dev-clean": 2000, "test-clean": 3000, "test-other": 4000}


@dataclass(frozen=True)
class Speaker:
    """`rate` in words a minute; `pitch` and `pitch_range` from 0 to 100."""

    id: int
    accent: str
    variant: str
    rate: int
    pitch: int
    pitch_range: int


def split_speakers(rng, split, count):
    """`count` different speakers; every variant comes up before one comes again."""
    variants = VARIANTS[split].split()
    order = rng.sample(variants, len(variants))
    speakers, seen = [], set()
    while len(speakers) < count:
        voice = (
            rng.choice(ACCENTS),
            order[len(speakers) % len(order)],
            rng.randint(130, 185),
            rng.randint(30, 70),
            rng.randint(30, 70),
        )
        if voice not in seen:
            seen.add(voice)
            speakers.append(Speaker(FIRST_ID[split] + len(speakers), *voice))
    return speakers
