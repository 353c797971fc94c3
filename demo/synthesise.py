"""Hours of synthesised speech from any English text, in LibriSpeech layout, for training.

python -m demo.synthesise data/synthetic --text sentences.txt --split synth-100 --hours 100
python -m demo.synthesise data/synthetic --digits --split synth-digits --hours 10
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import soundfile as sf
from filelock import FileLock, Timeout
from tqdm import tqdm

if not __package__:  # run as a file: let it find its own package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import espeak
from demo.acoustics import Conditions, check_share
from demo.plan import mean_seconds, share_out
from demo.processes import map_in_processes
from demo.readers import draw_readers
from demo.reading import read_chapter
from demo.texts import digit_strings, read_texts, repeated
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
    output = Path(os.path.abspath(output))
    folder, partial = output / split, output / f"{split}.partial"
    if _is_made(folder, config):
        print(f"{folder}: made before with the same options, kept")
        return json.loads((folder / MARKER).read_text())["hours"]
    _is_made(partial, config)
    espeak.start()  # what is missing is said here, not by every process
    rng = random.Random(seed)
    readers = draw_readers(rng, speakers, _first_id(split), foreign)
    draw = digit_strings if digits else repeated(read_texts(text, max_words))
    os.makedirs(output, exist_ok=True)
    with _held(output, split):
        _check_disk(output, partial, hours)
        os.makedirs(partial, exist_ok=True)
        sample = draw(rng, 2000)
        seconds = _marker(partial).get("mean_seconds")
        if seconds is None:  # of a new run: a killed one must go on with the same
            seconds = mean_seconds(sample, readers, digits)
            _mark(partial, {"config": config, "mean_seconds": seconds})
        texts = draw(rng, round(hours * 3600 / seconds))
        chapters = share_out(texts, readers, partial, conditions, digits)
        made = _read_all(chapters, workers) / 3600
        _write_speakers(partial, readers)
        _mark(partial, {"config": config, "hours": round(made, 2)})
        os.rename(partial, folder)
    return made


def _read_all(chapters, workers):
    """Speak the chapters that are not there yet; returns the seconds of all."""
    there = [chapter for chapter in chapters if os.path.isdir(chapter.folder)]
    missing = [chapter for chapter in chapters if not os.path.isdir(chapter.folder)]
    seconds = sum(map(_length, there))
    if there:
        print(f"{len(there)} chapters of {len(chapters)} are there already, and kept")
    total = sum(len(chapter.texts) for chapter in missing)
    with tqdm(total=total, unit=" utterances", disable=not sys.stderr.isatty()) as progress:
        for chapter, length in map_in_processes(read_chapter, missing, workers):
            seconds += length
            progress.update(len(chapter.texts))
            progress.set_postfix_str(f"{seconds / 3600:.2f} h", refresh=False)
    return seconds


def _length(chapter):
    return sum(sf.info(str(file)).duration for file in Path(chapter.folder).glob("*.flac"))


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


def _is_made(folder, config):
    """Is this split complete? UserError when others than these options made it."""
    if not folder.exists():
        return False
    found = _marker(folder)
    before = found.get("config")
    if before == config:
        return "hours" in found
    if before and not any(path.is_dir() for path in folder.iterdir()):
        (folder / MARKER).unlink()  # no chapter was said yet
    elif any(folder.iterdir()):
        differ = ", ".join(key for key in config if before and before.get(key) != config[key])
        reason = f"other options ({differ})" if before else "something else"
        raise UserError(
            f"{folder} was made by {reason}; choose another --split, or remove that folder"
        )
    return False


def _check_disk(output, partial, hours):
    there = sum(file.stat().st_size for file in partial.rglob("*.flac")) / 1e6
    needed = hours * MEGABYTES_PER_HOUR - there
    free = shutil.disk_usage(output).free / 1e6
    if needed > free:
        raise UserError(
            f"{output} has {free:,.0f} MB free, and {hours:g} hours take about {needed:,.0f} MB; "
            "make room, or give fewer --hours or another folder"
        )


def _held(output, split):
    lock = FileLock(output / f".{split}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is writing {output / split}; wait for it") from None


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


def _mark(folder, content):
    partial = folder / f".{MARKER}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / MARKER)


def _marker(folder):
    try:
        return json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def main(argv=None):
    args = _parser().parse_args(argv)
    options = vars(args)
    conditions = Conditions(
        *(options.pop(name) for name in ("noise", "reverb", "band_limit")),
        tuple(options.pop("snr")),
    )
    began = time.monotonic()
    try:
        made = synthesise(**options, conditions=conditions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, sf.LibsndfileError) as error:
        print(f"error: {error}; once that is mended, the same command goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
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
    parser.add_argument("--workers", type=int, help="processes; by default one a CPU")
    return parser


if __name__ == "__main__":
    main()
