"""A demo corpus in LibriSpeech layout, spoken by eSpeak NG: python -m demo.make_corpus data/demo

It takes seconds, so a recipe can be tried from end to end without any download. Texts and
speakers follow the seed; samples may differ between eSpeak versions.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

import soundfile as sf
from tqdm import tqdm

if not __package__:  # run as a file: let it find its own package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import espeak
from demo.processes import map_in_processes
from demo.sentences import split_sentences
from demo.speakers import split_speakers
from demo.split import held
from modules.command import count, plain_errors
from modules.errors import UserError

MARKER = "demo_corpus.json"  # what makes a folder ours: nothing without it is ever removed
VERSION = 1  # of what the same options make
TRAIN = "train-clean-100"
SNR = {TRAIN: (10, 40), "dev-clean": (18, 40), "test-clean": (18, 40), "test-other": (6, 18)}  # dB
MAX_EVAL_UTTERANCES = 1000  # the grammar has few short lines, and training must avoid all of them


def make_corpus(
    output,
    speakers=64,
    utterances=1000,
    eval_speakers=6,
    eval_utterances=66,
    digit_fraction=0.4,
    noise=True,
    seed=0,
    workers=None,
):
    """Write train-clean-100, dev-clean, test-clean and test-other into the folder `output`.

    No voice and no sentence is in two splits. `eval_*` count for each of dev and test;
    test-other has stranger voices and more noise. The folder appears only when it is complete;
    one that these options made before is kept as it is, another demo corpus is replaced.

    Returns {split: seconds of speech}. Raises UserError for options that cannot be met, for an
    `output` that holds anything else, and where espeakng-loader is not installed.
    """
    config = {
        "version": VERSION,
        "speakers": speakers,
        "utterances": utterances,
        "eval_speakers": eval_speakers,
        "eval_utterances": eval_utterances,
        "digit_fraction": digit_fraction,
        "noise": noise,
        "seed": seed,
    }
    _check(config)
    output = Path(os.path.abspath(output))
    before = _marker(output)
    if before and before["config"] == config and _is_complete(output, before):
        print(f"{output}: made before with the same options, kept")
        return before["seconds"]
    partial = output.with_name(f"{output.name}.partial")
    for folder in (output, partial):
        _check_ours(folder)
    espeak.start()  # what is missing is said here, not by every process
    os.makedirs(output.parent, exist_ok=True)
    with held(output):
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        _mark(partial, {"config": config})
        seconds = _render_all(_chapters(partial, config), workers)
        _mark(partial, {"config": config, "seconds": seconds, "files": _count(partial)})
        shutil.rmtree(output, ignore_errors=True)
        os.rename(partial, output)
    return seconds


def _check(config):
    for prefix in ("", "eval_"):
        speakers, utterances = config[f"{prefix}speakers"], config[f"{prefix}utterances"]
        if not 1 <= speakers <= min(utterances, 999):
            raise UserError(
                f"{prefix}speakers={speakers}, {prefix}utterances={utterances}: expected at least "
                f"one speaker, at most 999, and an utterance for each"
            )
    if config["eval_utterances"] > MAX_EVAL_UTTERANCES:
        raise UserError(
            f"eval_utterances={config['eval_utterances']}: at most {MAX_EVAL_UTTERANCES}, so that "
            f"training finds other sentences"
        )
    if not 0 <= config["digit_fraction"] <= 1:
        raise UserError(f"digit_fraction={config['digit_fraction']} is not between 0 and 1")


def _chapters(folder, config):
    """Share out the sentences: one chapter a speaker."""
    from demo.render import Chapter

    rng = random.Random(config["seed"])
    sizes = {split: config["utterances" if split == TRAIN else "eval_utterances"] for split in SNR}
    texts = split_sentences(rng, sizes, config["digit_fraction"])
    for split, snr in SNR.items():
        count = config["speakers" if split == TRAIN else "eval_speakers"]
        for index, speaker in enumerate(split_speakers(rng, split, count)):
            yield (
                split,
                Chapter(
                    folder=str(folder / split / str(speaker.id) / "1"),
                    speaker=speaker,
                    texts=tuple(texts[split][index::count]),
                    snr=snr if config["noise"] else None,
                    seed=rng.randrange(2**32),
                ),
            )


def _render_all(chapters, workers):
    """Render chapters in processes. Returns {split: seconds}."""
    from demo.render import render

    split_of = {chapter: split for split, chapter in chapters}
    seconds = dict.fromkeys(SNR, 0.0)
    total = sum(len(chapter.texts) for chapter in split_of)
    with tqdm(total=total, disable=not sys.stderr.isatty()) as progress:
        for chapter, length in map_in_processes(render, list(split_of), workers):
            seconds[split_of[chapter]] += length
            progress.update(len(chapter.texts))
    return seconds


def _mark(folder, content):
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n")


def _marker(folder):
    """What the marker of a demo corpus says, or None."""
    try:
        return json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _count(folder):
    return sum(1 for _ in folder.rglob("*.flac"))


def _is_complete(folder, marker):
    return "seconds" in marker and _count(folder) == marker["files"]


def _check_ours(folder):
    """Only an older demo corpus or an empty folder may be replaced."""
    if not folder.exists() or (folder / MARKER).exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(
            f"{folder} exists and is not a demo corpus (it has no {MARKER}); "
            f"choose another folder, or move it away"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m demo.make_corpus",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Make a small corpus of synthesised speech in LibriSpeech layout: digit "
        "strings and sentences of about 60 words. Needs: pip install -r requirements-demo.txt",
        epilog="Then: python librispeech_prepare.py OUTPUT manifests --train train-clean-100 "
        "--dev dev-clean --test test-clean test-other --merge train.csv",
    )
    parser.add_argument("output", help="the folder to make")
    parser.add_argument("--speakers", type=int, default=64, help="voices in training")
    parser.add_argument("--utterances", type=int, default=1000, help="sentences in training")
    parser.add_argument("--eval-speakers", type=int, default=6, help="voices in each other split")
    parser.add_argument(
        "--eval-utterances", type=int, default=66, help="sentences in each other split"
    )
    parser.add_argument(
        "--digit-fraction", type=float, default=0.4, help="share of digit strings among sentences"
    )
    parser.add_argument(
        "--noise", action=argparse.BooleanOptionalAction, default=True, help="add background noise"
    )
    parser.add_argument("--seed", type=int, default=0, help="for texts, voices and noise")
    parser.add_argument("--workers", type=count, help="processes; by default one a CPU")
    args = parser.parse_args(argv)
    failures = OSError, sf.LibsndfileError
    with plain_errors("interrupted; there is no new corpus", failures=failures):
        seconds = make_corpus(**vars(args))
    for split, length in seconds.items():
        print(f"{split}: {length / 60:.1f} min")


if __name__ == "__main__":
    main()
