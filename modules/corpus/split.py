"""From a split's name to its checked utterances: finding it, reading it, checking it."""

import difflib
import os
import sys

from tqdm import tqdm

from modules.corpus.audio import check_utterances
from modules.corpus.folder import FolderSource
from modules.corpus.manifest import ManifestSource
from modules.corpus.report import SplitReport
from modules.corpus.text import check_texts
from modules.errors import UserError

MANIFEST_SUFFIXES = (".csv", ".jsonl")
DURATION_TOLERANCE = 0.1  # seconds


def find_splits(data_folder):
    """Names of all splits in `data_folder`: its folders and manifests."""
    names = set()
    for entry in os.scandir(data_folder):
        stem, suffix = os.path.splitext(entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names.add(entry.name)
        elif suffix in MANIFEST_SUFFIXES:
            names.add(stem)
    return sorted(names)


def open_split(data_folder, split):
    """The source of a split: `<split>/`, or in its place `<split>.csv` or `<split>.jsonl`."""
    base = os.path.join(data_folder, split)
    if os.path.isdir(base):
        return FolderSource(base)
    for suffix in MANIFEST_SUFFIXES:
        if os.path.isfile(base + suffix):
            return ManifestSource(base + suffix)
    raise UserError(_missing_split(data_folder, split))


def _missing_split(data_folder, split):
    message = f"split {split!r}: no folder {os.path.join(data_folder, split)}"
    inner = os.path.join(data_folder, "LibriSpeech")
    if os.path.isdir(os.path.join(inner, split)):
        return f"{message}, but {inner} has it; give that as the data folder"
    present = find_splits(data_folder)
    near = difflib.get_close_matches(split, present, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{message}, nor {split}.csv or {split}.jsonl{hint} present: {', '.join(present) or '-'}"


def read_split(split, source, wanted, allowed_characters, workers, **limits):
    """Read and check one split; returns a SplitReport.

    `wanted` usable sentences are taken from the start in order of ids (None: all).
    """
    utterances, faults, notes = source.read()
    utterances, text_faults = check_texts(utterances, allowed_characters)
    report = SplitReport(split, text_faults=faults + text_faults, notes=notes)
    total = len(utterances) if wanted is None else min(wanted, len(utterances))
    with tqdm(total=total, desc=split, disable=not sys.stderr.isatty()) as progress:
        report.usable, report.audio_faults = check_utterances(
            utterances, wanted, workers, progress, **limits
        )
    report.unchecked = len(utterances) - len(report.usable) - len(report.audio_faults)
    if wanted is not None:
        report.notes.append(f"limited to {wanted} sentences of {len(utterances)}")
    if isinstance(source, ManifestSource):
        report.notes += _duration_notes(report.usable, source.stated_durations())
    return report


def _duration_notes(utterances, stated):
    """The audio decides; a manifest that says otherwise may mean other audio."""
    for utterance in utterances:
        seconds = stated.get(utterance.id, utterance.duration)
        if abs(seconds - utterance.duration) > DURATION_TOLERANCE:
            yield (
                f"{utterance.id}: the manifest says {seconds} s, the audio lasts "
                f"{utterance.duration:.3f} s (used)"
            )
