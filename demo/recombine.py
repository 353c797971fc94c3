"""New strings of the words that were recorded: python -m demo.recombine data/digits data/more

For speech of separate words, as strings of digits are, with silence between them: it is cut there,
and the words are put together anew, as one speaker's or as several speakers' strings. A model
then cannot learn the strings by heart. Nothing but the recordings of one split is used.
"""

import argparse
import os
import random
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from modules.errors import UserError

HOP = 0.005  # s
SHORTEST_GAP, SHORTEST_WORD = 0.05, 0.04  # s
LEVELS = (-80, -78, -82, -75, -70, -65, -60, -55, -50)  # dB, what is silence, until it fits
CHAPTER = 100  # utterances
EVERYBODY = 99999  # the speaker of strings by several
FIRST = 1001  # chapter; recordings have lower numbers


def read_words(folder):
    """All words of a split that can be told apart: {speaker: [(word, samples)]}, rate."""
    words, rates, unclear = {}, set(), 0
    for path in sorted(Path(folder).glob("*/*/*.trans.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, *text = line.split()
            samples, rate = sf.read(path.parent / f"{name}.flac", dtype="float32")
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
    return " ".join(word for word, _ in chosen), samples + 4e-5 * noise.standard_normal(
        len(samples), np.float32
    )


def resample(samples, factor):
    """Samples `factor` times as fast, by their spectrum."""
    length = max(1, round(len(samples) / factor))
    spectrum = np.fft.rfft(samples)
    bins = length // 2 + 1
    spectrum = np.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    return (np.fft.irfft(spectrum, length) * length / len(samples)).astype(np.float32)


def write_chapter(folder, words, rate, seed, options):
    """CHAPTER utterances and their transcripts: seconds. The folder appears when it is whole."""
    rng, seconds, lines = random.Random(seed), 0.0, []
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    name = f"{folder.parent.name}-{folder.name}"
    for i in range(CHAPTER):
        text, samples = string(words, rate, rng, **options)
        sf.write(partial / f"{name}-{i:04d}.flac", np.clip(samples, -1, 1), rate)
        lines.append(f"{name}-{i:04d} {text}\n")
        seconds += len(samples) / rate
    (partial / f"{name}.trans.txt").write_text("".join(lines), encoding="utf-8")
    os.rename(partial, folder)
    return seconds


def recombine(source, output, utterances, mixed, seed, workers, **options):
    """Write `utterances` new strings of a split's words into the folder `output`: hours.

    mixed : share of the strings whose words come from several speakers
    options : (low, high) of length, words of a string; gap, seconds between words; speed, of a word
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} exists; give a new folder, or remove it")
    words, rate, unclear = read_words(source)
    if unclear:
        print(f"{unclear} utterances whose words run together are left out", file=sys.stderr)
    rng, everything = random.Random(seed), [w for own in words.values() for w in own]
    jobs = []
    for i in range(-(-utterances // CHAPTER)):
        speaker = EVERYBODY if rng.random() < mixed else rng.choice(sorted(words))
        own = everything if speaker == EVERYBODY else words[speaker]
        folder = output.with_name(f"{output.name}.partial") / str(speaker) / str(FIRST + i)
        jobs.append((folder, own, rate, rng.getrandbits(32), options))
    shutil.rmtree(output.with_name(f"{output.name}.partial"), ignore_errors=True)
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(write_chapter, *zip(*jobs, strict=True))
        seconds = sum(tqdm(done, total=len(jobs), disable=not sys.stderr.isatty()))
    os.rename(output.with_name(f"{output.name}.partial"), output)
    return seconds / 3600


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m demo.recombine",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Then: python train_CTC.py ... --data_folder of both --train_splits "
        '"[train-clean-100,recombined]"',
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
    parser.add_argument("--workers", type=int, help="processes; by default one a CPU")
    try:
        hours = recombine(**vars(parser.parse_args(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{hours:.2f} h")


if __name__ == "__main__":
    main()
