"""Recordings with transcripts, heard by a packaged model, and the errors."""

from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from inference.report.alignments import SUBSTITUTION
from inference.report.rates import character_counts, estimate, word_counts
from modules.corpus.folder import FolderSource
from modules.corpus.manifest import ManifestSource
from modules.corpus.report import UNREADABLE, Fault, SplitReport
from modules.corpus.split import MANIFEST_SUFFIXES
from modules.corpus.text import check_texts
from modules.errors import UserError
from modules.whole import whole


def read(places):
    """Folders and manifests -> a SplitReport each; UserError for one without transcripts."""
    reports = {}
    for place in map(Path, places):
        if place.is_dir():
            name, source = place.resolve().name, FolderSource(place)
        elif place.is_file() and place.suffix in MANIFEST_SUFFIXES:
            name, source = place.stem, ManifestSource(place)
        else:
            raise UserError(
                f"{place} is no folder, nor a manifest ({', '.join(MANIFEST_SUFFIXES)}); give one "
                "that holds recordings and their transcripts"
            )
        if name in reports:
            raise UserError(f"two test sets are called {name}; score {place} by itself")
        utterances, faults, notes = source.read()
        usable, more = check_texts(utterances, allowed_characters=None)
        reports[name] = SplitReport(name, usable, faults + more, notes=notes)
        if not usable:
            lines = list(reports[name].lines(examples=3)) or ["  no recording, no transcript"]
            raise UserError("\n".join([f"{place} holds no utterance that can be scored:", *lines]))
    return list(reports.values())


def hear(recognizer, report, batch_size=16, chunk_seconds=None):
    """{id: text}; recordings that cannot be heard become faults of the report.

    UserError when none can be.
    """
    waiting = defaultdict(list)
    for utterance in report.usable:
        waiting[utterance.audio].append(utterance)
    texts = {}
    results = recognizer.transcribe_files(list(waiting), batch_size, chunk_seconds, in_order=False)
    bar = tqdm(results, report.split, len(waiting), unit="file", disable=None, leave=False)
    for result in bar:
        for utterance in waiting[result.path]:
            if result.error:
                report.audio_faults.append(Fault(UNREADABLE, utterance.audio, result.error))
            else:
                texts[utterance.id] = result.transcript.text
    report.usable = [u for u in report.usable if u.id in texts]
    if not texts:
        raise UserError(
            f"no recording of {report.split} can be heard: {report.audio_faults[0].detail}"
        )
    return texts


def write(path, utterances, texts):
    """SpeechBrain's file of error rates and alignments."""
    from speechbrain.utils.metric_stats import ErrorRateStats

    stats = ErrorRateStats()
    words = [texts[u.id].split() for u in utterances], [u.text.split() for u in utterances]
    stats.append([u.id for u in utterances], *words)
    with whole(path) as beside, open(beside, "w", encoding="utf-8") as file:
        stats.write_stats(file)


def summary(name, utterances):
    """A line of rates with their intervals; another where spelling alone makes errors."""
    words, characters = word_counts(utterances), character_counts(utterances)
    rates = f"WER {estimate([words])}, CER {estimate([characters])}"
    line = f"{name}: {rates}; {words[:, 1].sum()} words in {len(utterances)} utterances"
    spelling = sum(
        operation == SUBSTITUTION and said.casefold() == heard.casefold()
        for u in utterances
        for operation, said, heard in u.columns
    )
    if spelling:
        line += (
            f"\n  {spelling} errors are of capital and small letters alone; write the transcripts "
            "as the model spells"
        )
    return line
