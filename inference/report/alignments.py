"""wer_<test set>.txt, as SpeechBrain's ErrorRateStats writes it -> utterances, each word aligned.

Whatever is missing is an error: half a file gives wrong rates without looking wrong.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from modules.errors import UserError

COUNTS = r"\[ (\d+) / (\d+), (\d+) ins, (\d+) del, (\d+) sub \]"
TOTAL = re.compile(rf"%WER (\S+) {COUNTS}( \[PARTIAL\])?")
SCORED = re.compile(r"Scored (\d+) sentences, (\d+) not present in hyp\.")
UTTERANCE = re.compile(rf"(.*), %WER (\S+) {COUNTS}")
RULE = "=" * 80
GAP = " ; "
EQUAL, INSERTION, DELETION, SUBSTITUTION = "=IDS"
EXPECTED = "give a wer_<test set>.txt that a training or an evaluation wrote to its end"


@dataclass(frozen=True)
class Utterance:
    """What was said and what was heard: columns (operation, word said, word heard)."""

    id: str
    columns: tuple

    @property
    def speaker(self):
        """LibriSpeech's ids begin with the speaker."""
        return self.id.partition("-")[0]

    @property
    def reference(self):
        return [said for op, said, _ in self.columns if op != INSERTION]

    @property
    def hypothesis(self):
        return [heard for op, _, heard in self.columns if op != DELETION]

    @property
    def errors(self):
        return sum(op != EQUAL for op, _, _ in self.columns)

    def count(self, operation):
        return sum(op == operation for op, _, _ in self.columns)


def read_alignments(path):
    """The utterances of a file, in its order; UserError with the line for whatever is amiss."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text (byte {error.start}); {EXPECTED}") from None
    # Not splitlines(): words may hold what it takes for the end of a line.
    return Reader(path, text.replace("\r\n", "\n").split("\n")).utterances()


class Reader:
    """The lines of one file, read from top to bottom."""

    def __init__(self, path, lines):
        self.path, self.lines, self.at = path, lines, 0

    def fail(self, problem):
        raise UserError(f"{self.path}, line {self.at}: {problem}; {EXPECTED}")

    def line(self, wanted):
        """The next line; UserError where the file has ended."""
        self.at += 1
        # The last line ends in a newline too, so the piece after it is none.
        if self.at >= len(self.lines):
            self.fail(f"the file ends before {wanted}")
        return self.lines[self.at - 1]

    def match(self, pattern, wanted):
        line = self.line(wanted)
        found = pattern.fullmatch(line.rstrip())
        if not found:
            self.fail(f"{line[:60]!r} is not {wanted}")
        return found

    def utterances(self):
        """All of them, with sums that agree with the head of the file."""
        total = self.match(TOTAL, "the head '%WER ... [ errors / words, ... ]'")
        self.line("the sentence error rate")
        scored = self.match(SCORED, "'Scored N sentences, ...'")
        while self.line("the first utterance").rstrip() != RULE or not self.starts_utterance():
            pass
        found = [self.utterance()]
        while self.more():
            found.append(self.utterance())
        if len(found) != int(scored[1]):
            self.fail(f"the head tells of {scored[1]} sentences, and {len(found)} follow")
        if len({u.id for u in found}) != len(found):
            self.fail("an utterance is there twice")
        self.check_sums(total.groups()[1:6], found)
        return found

    def starts_utterance(self):
        """Whether the next line is the head of an utterance, and not of the format's example."""
        return self.at < len(self.lines) and UTTERANCE.fullmatch(self.lines[self.at].rstrip())

    def more(self):
        """Whether another utterance follows: a rule, and not the end of the file."""
        if not any(line.strip() for line in self.lines[self.at :]):
            return False
        if self.line("an utterance").rstrip() != RULE:
            self.fail(f"{self.lines[self.at - 1][:60]!r} is not the line between two utterances")
        return True

    def utterance(self):
        """The head of one utterance and its three lines."""
        head = self.match(UTTERANCE, "the head of an utterance 'ID, %WER ...'")
        said, ops, heard = (self.line(f"the end of {head[1]}") for _ in range(3))
        found = Utterance(head[1], tuple(self.columns(said, ops, heard)))
        self.check_sums(head.groups()[2:], [found])
        return found

    def columns(self, said, ops, heard):
        """Three lines of cells of equal widths; the operations tell the widths.

        A word may hold anything but white space, the separator's sign included.
        """
        if not (said.strip() or ops.strip() or heard.strip()):
            return  # nothing was said, and nothing heard
        start = 0
        cells = ops.split(GAP)
        for i, cell in enumerate(cells):
            # The last cell goes to the end: blanks there may be lost in an editor.
            end = start + len(cell) if i + 1 < len(cells) else None
            op, a, b = cell.strip(), said[start:end].strip(), heard[start:end].strip()
            whole = end is None or said[end : end + 3] == heard[end : end + 3] == GAP
            if op not in ("=", "I", "D", "S") or not (a and b and whole):
                self.fail("the three lines of the alignment do not fit each other")
            if op == EQUAL and a != b:
                self.fail(f"{a!r} and {b!r} are marked as equal")
            yield op, None if op == INSERTION else a, None if op == DELETION else b
            start = (end or 0) + len(GAP)

    def check_sums(self, counts, utterances):
        """UserError unless (errors, words, insertions, deletions, substitutions) are those."""
        kinds = [sum(u.count(op) for u in utterances) for op in (INSERTION, DELETION, SUBSTITUTION)]
        found = [sum(kinds), sum(len(u.reference) for u in utterances), *kinds]
        if found != [int(n) for n in counts]:
            self.fail(
                "the alignment has {} errors in {} words ({} ins, {} del, {} sub), and its head "
                "tells of {} in {} ({}, {}, {})".format(*found, *counts)
            )
