"""New strings of recorded words: python -m demo.recombine digits/train-clean-100 digits/recombined

For speech of separate words, as strings of digits are, with silence between them: it is cut there,
and the words are put together anew, as one speaker's or as several speakers' strings. A model
then cannot learn the strings by heart. Nothing but the recordings of one split is used.
"""

import argparse
import functools
import hashlib
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from demo.split import Split, write_chapter
from modules.command import count, plain_errors
from modules.errors import UserError

MARKER = "recombination.json"  # in the split: which options made it
VERSION = 2  # of what the same options make
HOP = 0.005  # s
SHORTEST_GAP, SHORTEST_WORD = 0.05, 0.04  # s
LEVELS = (-80, -78, -82, -75, -70, -65, -60, -55, -50)  # dB, what is silence, until it fits
CHAPTER = 100  # utterances
EVERYBODY = 99999  # the speaker of strings by several


def read_words(folder):
    """All words of a split that can be told apart: {speaker: [(word, samples)]}, rate."""
    words, rates, unclear = {}, set(), 0
    for path in sorted(Path(folder).glob("*/*/*.trans.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            name, *text = line.split()
            samples, rate = read_mono(path.parent / f"{name}.flac")
            rates.add(rate)
            spans = cut(samples, rate, len(text))
            unclear += spans is None
            for word, (start, end) in zip(text, spans or [], strict=bool(spans)):
                words.setdefault(path.parts[-3], []).append((word, samples[start:end]))
    if not words:
        raise UserError(
            f"{folder} holds no speech of separate words (<speaker>/<chapter>/*.trans.txt with "
            "silence between the words); give a split such as digits/train-clean-100"
        )
    if len(rates) > 1:
        raise UserError(f"{folder} has several sample rates, {sorted(rates)} Hz; resample it first")
    return words, rates.pop(), unclear


def read_mono(path):
    """Samples (N,) and Hz; UserError for what is no recording of one channel."""
    try:
        samples, rate = sf.read(path, dtype="float32")
    except (OSError, sf.LibsndfileError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if samples.ndim > 1:
        raise UserError(f"{path} has {samples.shape[1]} channels; give one")
    return samples, rate


def cut(samples, rate, count):
    """Where `count` words begin and end, in samples; None when silence does not tell."""
    hop = round(HOP * rate)
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    decibels = 10 * np.log10((frames**2).mean(1) + 1e-10)
    for level in LEVELS:
        edges = np.flatnonzero(np.diff(np.r_[0, (decibels > level).astype(int), 0]))
        spans = []
        for start, end in edges.reshape(-1, 2).tolist():
            if spans and start - spans[-1][1] < SHORTEST_GAP / HOP:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        spans = [(a * hop, b * hop) for a, b in spans if b - a >= SHORTEST_WORD / HOP]
        if len(spans) == count:
            return spans
    return None


def string(words, rate, rng, length, gap, speed):
    """One utterance of random words: (text, samples)."""
    chosen = [rng.choice(words) for _ in range(rng.randint(*length))]
    noise = np.random.default_rng(rng.getrandbits(32))
    parts = []
    for _, samples in chosen:
        parts.append(np.zeros(round(rng.uniform(*gap) * rate), np.float32))
        parts.append(resample(samples, rng.uniform(*speed)))
    parts.append(np.zeros(round(rng.uniform(*gap) * rate), np.float32))
    samples = np.concatenate(parts)
    samples = samples + 4e-5 * noise.standard_normal(len(samples), np.float32)
    return " ".join(word for word, _ in chosen), np.clip(samples, -1, 1)


def resample(samples, factor):
    """Samples `factor` times as fast, by their spectrum."""
    length = max(1, round(len(samples) / factor))
    spectrum = np.fft.rfft(samples)
    bins = length // 2 + 1
    spectrum = np.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    return (np.fft.irfft(spectrum, length) * length / len(samples)).astype(np.float32)


@dataclass(frozen=True)
class Chapter:
    """Strings to make of some of the words, [(word, samples)]."""

    folder: Path
    words: list
    count: int
    seed: int


def make_chapter(rate, options, chapter):
    """Make a chapter's strings and write them; returns seconds of speech."""
    rng = random.Random(chapter.seed)
    strings = (string(chapter.words, rate, rng, **options) for _ in range(chapter.count))
    return write_chapter(chapter, strings, rate)


def recombine(source, output, utterances, mixed, seed, workers, **options):
    """Write `utterances` new strings of a split's words into the folder `output`: hours.

    mixed : share of the strings whose words come from several speakers
    options : (low, high) of length, words of a string; gap, seconds between words; speed, of a word
    The folder appears when it is complete; a run that was stopped goes on with the same options.
    Its chapters' numbers follow its name, so that several such splits, with their recordings, can
    be one training set.
    UserError for options that cannot be met, for a source without separate words, for a folder
    that other options made, and while another run is at it.
    """
    check(utterances, mixed, **options)
    config = {"version": VERSION, "source": digest(source), "utterances": utterances}
    config |= {"mixed": mixed, "seed": seed, **{k: list(v) for k, v in options.items()}}
    split = Split(output, MARKER, config)
    if (before := split.made()) is not None:
        return before
    words, rate, unclear = read_words(source)
    if unclear:
        print(f"{unclear} utterances whose words run together are left out", file=sys.stderr)
    with split.making() as partial:
        first = first_chapter(split.folder.name)
        chapters = list(share_out(words, partial, first, utterances, mixed, seed))
        return split.make(functools.partial(make_chapter, rate, options), chapters, workers)


def digest(folder):
    """What tells one split from another: a hash of its files."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).glob("*/*/*")):
        if path.suffix in (".txt", ".flac"):
            found.update(f"{path.name} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def share_out(words, folder, first, utterances, mixed, seed):
    """Yield the chapters: those of several speakers, and those of one, for all equally many."""
    rng, everything = random.Random(seed), [w for own in words.values() for w in own]
    together, speakers = round(mixed * utterances), sorted(words)
    rng.shuffle(speakers)
    each, more = divmod(utterances - together, len(speakers))
    shares = {EVERYBODY: together} | {s: each + (i < more) for i, s in enumerate(speakers)}
    chapters = [
        (speaker, min(CHAPTER, share - start))
        for speaker, share in shares.items()
        for start in range(0, share, CHAPTER)
    ]
    for i, (speaker, size) in enumerate(chapters):
        own = everything if speaker == EVERYBODY else words[speaker]
        yield Chapter(folder / str(speaker) / str(first + i), own, size, rng.getrandbits(32))


def first_chapter(split):
    """Seven digits and more, which no chapter of recordings has; others for every name."""
    return 1_000_000 + 100_000 * (zlib.crc32(split.encode()) % 9000)


def check(utterances, mixed, length, gap, speed):
    """UserError for what cannot be meant."""
    if not 1 <= utterances <= 1_000_000:
        raise UserError(f"utterances={utterances}: expected 1 to 1,000,000")
    if not 0 <= mixed <= 1:
        raise UserError(f"mixed={mixed} is a share of all, so between 0 and 1")
    for name, (low, high), least in (
        ("length", length, 1),
        ("gap", gap, 0.0),
        ("speed", speed, 0.1),
    ):
        if not least <= low <= high:
            raise UserError(f"{name}={low} {high}: expected {least} or more, the lower first")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m demo.recombine",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog='Then: python train_CTC.py ... --train_splits "[train-clean-100, recombined]"; see '
        "docs/synthetic.md",
    )
    parser.add_argument("source", help="a split: digits/train-clean-100")
    parser.add_argument("output", help="the split to make: digits/recombined")
    parser.add_argument("--utterances", type=int, default=5000, help="strings to make")
    parser.add_argument("--mixed", type=float, default=0.3, help="share of strings by several")
    low_high = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    parser.add_argument("--length", type=int, default=[2, 8], help="words", **low_high)
    parser.add_argument("--gap", type=float, default=[0.04, 0.25], help="s of silence", **low_high)
    parser.add_argument("--speed", type=float, default=[0.92, 1.08], help="of a word", **low_high)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=count, help="processes; by default one a CPU")
    args = parser.parse_args(argv)
    with plain_errors(
        "stopped; the same command goes on from here",
        "once that is mended, the same command goes on",
        (OSError, sf.LibsndfileError),
    ):
        hours = recombine(**vars(args))
    print(f"{args.output}: {hours:.2f} h")


if __name__ == "__main__":
    main()
