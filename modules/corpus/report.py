"""What was found in a corpus and what is wrong with it: the types, the log lines, the full text."""

import csv
import io
from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 3  # a kind of fault that go to the log; the report file has all

UNREADABLE = "unreadable audio"
EMPTY_AUDIO = "audio with 0 samples"
TOO_SHORT = "audio too short"
TOO_LONG = "audio too long"
WRONG_RATE = "wrong sample rate"
NOT_MONO = "more than one channel"
NOT_FINITE = "audio with NaN or infinity"
SILENT = "silent audio"
CLIPPED = "clipped audio"
NO_TRANSCRIPT_FILE = "missing transcript file"
NO_TEXT = "audio without text"
NO_AUDIO = "text without audio"
EMPTY_TEXT = "empty text"
BAD_CHARACTERS = "unexpected characters"
NOT_UTF8 = "transcript not UTF-8"
DUPLICATE = "duplicate id"
BAD_ROW = "row that cannot be read"

REMEDIES = {
    UNREADABLE: "fetch or convert the file again",
    EMPTY_AUDIO: "fetch the file again, or remove it with its text",
    TOO_SHORT: "lower min_seconds, or remove it with its text",
    TOO_LONG: "raise max_seconds, or cut the recording into sentences",
    WRONG_RATE: "convert it: ffmpeg -i IN -ac 1 -ar RATE OUT.flac",
    NOT_MONO: "convert it: ffmpeg -i IN -ac 1 -ar RATE OUT.flac",
    NOT_FINITE: "fetch or convert the file again",
    SILENT: "record it again, or remove it with its text",
    CLIPPED: "record it more quietly, or raise max_clipped",
    NO_TRANSCRIPT_FILE: "restore the .trans.txt file beside the audio",
    NO_TEXT: "add a line 'ID TEXT' to the .trans.txt file, or remove the audio",
    NO_AUDIO: "restore the audio file, or remove the line",
    EMPTY_TEXT: "write the words behind the id, or remove the utterance",
    BAD_CHARACTERS: "normalise the text, or widen allowed_characters (in a recipe set --alphabet "
    "and --output_neurons)",
    NOT_UTF8: "convert the file: iconv -f latin1 -t utf-8",
    BAD_ROW: "correct the row, or remove it",
    DUPLICATE: "rename one of the two, or remove it",
}


@dataclass(frozen=True)
class Utterance:
    """One sentence: `audio` is an absolute path, `speaker` is empty where it is unknown."""

    id: str
    audio: str
    text: str
    spk_id: str
    speaker: str = ""
    duration: float | None = None  # seconds


@dataclass(frozen=True)
class Fault:
    """One utterance that cannot be used: `where` is a path, or FILE:LINE."""

    kind: str
    where: str
    detail: str = ""


@dataclass
class SplitReport:
    """The outcome of one split: what can be used, what was left out, and what else to know."""

    split: str
    usable: list[Utterance] = field(default_factory=list)
    text_faults: list[Fault] = field(default_factory=list)
    audio_faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchecked: int = 0  # sentences with text whose audio a limit left unread

    @property
    def faults(self):
        return self.text_faults + self.audio_faults

    @property
    def bad_fraction(self):
        """The share of the split that is unusable, taking unread audio to be like the rest."""
        checked = len(self.usable) + len(self.audio_faults)
        found = len(self.text_faults) + checked + self.unchecked
        text = len(self.text_faults) / max(1, found)
        return text + (1 - text) * len(self.audio_faults) / max(1, checked)

    def summary(self):
        hours = sum(u.duration for u in self.usable) / 3600
        speakers = len({u.speaker for u in self.usable if u.speaker})
        return (
            f"{self.split}: {len(self.usable)} sentences, {hours:.3f} h, "
            f"{speakers or 'unknown'} speakers, {len(self.faults)} left out "
            f"({100 * self.bad_fraction:.1f} %)"
        )

    def lines(self, examples=None):
        """Lines of text on what was left out, with `examples` paths a kind (None: all)."""
        for kind, count in Counter(f.kind for f in self.faults).most_common():
            yield f"  {kind}: {count} ({REMEDIES[kind]})"
            places = [f for f in self.faults if f.kind == kind]
            for fault in places[:examples]:
                yield f"    {fault.where}" + (f": {fault.detail}" if fault.detail else "")
            if examples is not None and count > examples:
                yield f"    ... and {count - examples} more"
        for note in self.notes:
            yield f"  note: {note}"


def note_overlaps(groups, reports):
    """Training on sentences or readers of the test sets makes their error rates too good."""
    train, *others = groups
    for split in {name for group in others for name in group}:
        for other in train:
            for what, key in (("sentences", "id"), ("speakers", "speaker")):
                ours, theirs = (
                    {getattr(u, key) for u in reports[name].usable} - {""}
                    for name in (split, other)
                )
                if shared := ours & theirs:
                    reports[split].notes.append(
                        f"{len(shared)} {what} of {len(ours)} are also in {other}: "
                        f"{', '.join(sorted(shared)[:EXAMPLES])}"
                    )


def quarantine_text(reports):
    """A table of what was left out: split, fault, where (a path, or FILE:LINE), detail."""
    file = io.StringIO()
    writer = csv.writer(file, "excel-tab", lineterminator="\n")
    writer.writerow(["split", "fault", "where", "detail"])
    for report in reports:
        writer.writerows([report.split, f.kind, f.where, f.detail] for f in report.faults)
    return file.getvalue()


def text_report(data_folder, reports):
    """The full report as text: every fault of every split."""
    lines = [f"Corpus: {data_folder}", ""]
    for report in reports:
        lines += [report.summary(), *report.lines()]
        characters = sorted(set().union(*(set(u.text) for u in report.usable)))
        lines += [f"  characters: {''.join(characters)!r}", ""]
    return "\n".join(lines)
