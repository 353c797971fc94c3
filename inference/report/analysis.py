"""Where the errors are: by word, by speaker, by the length of an utterance, and the worst ones."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from inference.report.alignments import DELETION, INSERTION, SUBSTITUTION

LENGTHS = (1, 4, 8, 16, 32)  # words: each begins a group that ends before the next


@dataclass
class Count:
    """Errors by kind in so many words."""

    words: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    utterances: int = 0

    @property
    def errors(self):
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self):
        """Percent; None where nothing was said."""
        return 100 * self.errors / self.words if self.words else None

    def add(self, utterance):
        self.utterances += 1
        self.words += len(utterance.reference)
        self.substitutions += utterance.count(SUBSTITUTION)
        self.deletions += utterance.count(DELETION)
        self.insertions += utterance.count(INSERTION)


def whole(runs):
    """All runs together."""
    total = Count()
    for utterance in every(runs):
        total.add(utterance)
    return total


def by_speaker(runs):
    """{speaker: Count}, the worst first; None where ids do not begin with a speaker."""
    if not all("-" in u.id for u in every(runs)):
        return None
    return grouped(runs, lambda u: u.speaker)


def by_length(runs):
    """{"4 to 7 words": Count}, the shortest first."""

    def begin(utterance):
        return max((n for n in LENGTHS if n <= len(utterance.reference)), default=0)

    found = grouped(runs, begin)
    return {length_name(n): found[n] for n in (0, *LENGTHS) if n in found}


def length_name(begin):
    if begin == 0:
        return "no words"
    end = next((n - 1 for n in LENGTHS if n > begin), None)
    return f"{begin} to {end} words" if end else f"{begin} words and more"


def grouped(runs, key):
    """{key of an utterance: Count}, the highest WER first."""
    groups = defaultdict(Count)
    for utterance in every(runs):
        groups[key(utterance)].add(utterance)
    return dict(sorted(groups.items(), key=lambda g: (-(g[1].wer or 0), str(g[0]))))


def by_word(runs):
    """{word: Count} of those with errors, the most errors first.

    Insertions count at the word inserted, which need not be one that was said.
    """
    words = defaultdict(Count)
    for utterance in every(runs):
        for op, said, heard in utterance.columns:
            count = words[heard if op == INSERTION else said]
            count.words += op != INSERTION
            count.substitutions += op == SUBSTITUTION
            count.deletions += op == DELETION
            count.insertions += op == INSERTION
    wrong = {word: count for word, count in words.items() if count.errors}
    return dict(sorted(wrong.items(), key=lambda w: (-w[1].errors, w[0])))


def confusions(runs):
    """[((said, heard), times)], the most frequent first; "" for nothing said, or heard."""
    pairs = Counter(
        (said or "", heard or "") for u in every(runs) for op, said, heard in u.columns if op != "="
    )
    return sorted(pairs.items(), key=lambda p: (-p[1], p[0]))


def worst(runs):
    """[(id, errors, words, said, heard of the first run)], the most errors over all runs first."""
    found = []
    for same in zip(*runs, strict=True):
        errors = sum(u.errors for u in same)
        if errors:
            words = sum(len(u.reference) for u in same)
            said, heard = " ".join(same[0].reference), " ".join(same[0].hypothesis)
            found.append((same[0].id, errors, words, said, heard))
    return sorted(found, key=lambda u: (-u[1], u[0]))


def every(runs):
    return (utterance for run in runs for utterance in run)
