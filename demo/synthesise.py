"""Hours of synthesised speech from any English text, in LibriSpeech layout, for training.

python -m demo.synthesise data/synthetic --text sentences.txt --split synth-100 --hours 100
python -m demo.synthesise data/synthetic --digits --split synth-digits --hours 10
"""

import argparse
import hashlib
import os
import random
import shutil
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import soundfile as sf

if not __package__:  # run as a file: let it find its own package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import espeak
from demo.acoustics import Conditions, check_share
from demo.plan import mean_seconds, share_out
from demo.readers import draw_readers
from demo.reading import read_chapter
from demo.split import Split
from demo.texts import digit_strings, read_texts, repeated
from modules.command import count, plain_errors
from modules.errors import UserError

MARKER = "synthesis.json"  # in a split: which options made it
VERSION = 2  # of what the same options make
MEGABYTES_PER_HOUR = 90


def synthesise(
    output,
    split,
    text=None,
    digits=False,
    hours=100.0,
    speakers=400,
    foreign=0.35,
    conditions=None,
    max_words=40,
    seed=0,
    workers=None,
):
    """Write about `hours` of speech as the split `<output>/<split>`; returns the hours made.

    Every line of `text` is read equally often (once more or less), by readers of its own; with
    `digits`, strings of digits are read instead. The folder appears when it is complete. Until
    then it is `<split>.partial`, whose complete chapters are kept by a run with the same options.

    Raises UserError for options that cannot be met, for a folder that other options made, while
    another run is at it, and where espeakng-loader is not installed.
    """
    conditions = conditions or Conditions()
    config = {
        "version": VERSION,
        "text": None if digits else _digest(text),
        "hours": hours,
        "speakers": speakers,
        "foreign": foreign,
        "conditions": {**asdict(conditions), "snr": list(conditions.snr)},
        "max_words": max_words,
        "seed": seed,
    }
    _check(split, text, digits, hours, speakers, max_words)
    check_share("foreign", foreign)
    conditions.check()
    made = Split(Path(output) / split, MARKER, config)
    if (before := made.made()) is not None:
        return before
    espeak.start()  # what is missing is said here, not by every process
    rng = random.Random(seed)
    readers = draw_readers(rng, speakers, _first_id(split), foreign)
    draw = digit_strings if digits else repeated(read_texts(text, max_words))
    with made.making() as partial:
        _check_disk(partial, hours)
        sample = draw(rng, 2000)
        seconds = made.noted("mean_seconds")
        if seconds is None:  # of a new run: a killed one must go on with the same
            seconds = mean_seconds(sample, readers, digits)
            made.note(mean_seconds=seconds)
        texts = draw(rng, round(hours * 3600 / seconds))
        chapters = share_out(texts, readers, partial, conditions, digits)
        _write_speakers(partial, readers)
        return made.make(read_chapter, chapters, workers)


def _check(split, text, digits, hours, speakers, max_words):
    if (text is None) == (not digits):
        raise UserError("give either a text, --text FILE, or --digits")
    if not split or split != os.path.basename(split) or split.startswith("."):
        raise UserError(f"split={split!r} is no name of a folder; expected one such as synth-100")
    if not 1 <= speakers <= 1000:
        raise UserError(f"speakers={speakers}: expected 1 to 1000")
    if not hours > 0 or max_words < 1:
        raise UserError(f"hours={hours}, max_words={max_words}: expected more than 0")


def _digest(path):
    """What tells one text from another, or None where `read_texts` will say what is wrong."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
    except OSError:
        return None


def _check_disk(partial, hours):
    there = sum(file.stat().st_size for file in partial.rglob("*.flac")) / 1e6
    needed = hours * MEGABYTES_PER_HOUR - there
    free = shutil.disk_usage(partial).free / 1e6
    if needed > free:
        raise UserError(
            f"{partial.parent} has {free:,.0f} MB free, and {hours:g} hours take about "
            f"{needed:,.0f} MB; make room, or give fewer --hours or another folder"
        )


def _first_id(split):
    """Speakers' ids: six or more digits that LibriSpeech has not, others for every split."""
    return 100_000 + 1000 * (zlib.crc32(split.encode()) % 9900)


def _write_speakers(folder, readers):
    rows = ["id\taccent\tvariant\tforeign\trate\tpitch\tsize"]
    rows += [
        f"{r.id}\t{r.accent}\t{r.variant}\t{r.foreign}\t{r.rate}\t{r.pitch}\t{r.size}"
        for r in readers
    ]
    (folder / "speakers.tsv").write_text("\n".join(rows) + "\n")


def main(argv=None):
    args = _parser().parse_args(argv)
    options = vars(args)
    conditions = Conditions(
        *(options.pop(name) for name in ("noise", "reverb", "band_limit")),
        tuple(options.pop("snr")),
    )
    began = time.monotonic()
    with plain_errors(
        "stopped; the same command goes on from here",
        "once that is mended, the same command goes on",
        (OSError, sf.LibsndfileError),
    ):
        made = synthesise(**options, conditions=conditions)
    took = time.monotonic() - began
    print(f"{args.split}: {made:.2f} h in {args.output}/{args.split}, made in {took:.0f} s")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m demo.synthesise",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Hours of synthesised speech from any English text, in LibriSpeech layout: "
        "hundreds of voices, native and foreign accents, noise, rooms and band limits. A run that "
        "was stopped or killed goes on with the same command. Needs: pip install -r "
        "requirements-demo.txt",
        epilog='Then train on it alone, --data_folder OUTPUT --train_splits "[synth-100]", or '
        "with real speech: see docs/synthetic.md",
    )
    parser.add_argument("output", help="the folder that gets the split")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="a sentence a line, or LibriSpeech's lines: 19-198-0000 NORTHANGER ABBEY; read again "
        "by other voices until the hours are full",
    )
    parser.add_argument(
        "--digits", action="store_true", help="no text: strings of 3 to 8 digits, dictated"
    )
    parser.add_argument("--split", default="synth-100", help="name of the folder in OUTPUT")
    parser.add_argument("--hours", type=float, default=100.0, help="about how much to make")
    parser.add_argument("--speakers", type=int, default=400, help="voices, at most 1000")
    parser.add_argument("--foreign", type=float, default=0.35, help="share of foreign accents")
    conditions = Conditions()
    for name, what in (
        ("noise", "noise, coloured or of voices"),
        ("reverb", "a room"),
        ("band-limit", "a narrow band, as of telephones"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            metavar="SHARE",
            default=getattr(conditions, name.replace("-", "_")),
            help=f"share of the utterances with {what}",
        )
    parser.add_argument(
        "--snr",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=conditions.snr,
        help="speech to noise, in dB",
    )
    parser.add_argument("--max-words", type=int, default=40, help="longer lines are cut evenly")
    parser.add_argument("--seed", type=int, default=0, help="for texts, voices and conditions")
    parser.add_argument("--workers", type=count, help="processes; by default one a CPU")
    return parser


if __name__ == "__main__":
    main()
