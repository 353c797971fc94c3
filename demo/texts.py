"""What a synthesised corpus says: the lines of a text file, or strings of digits."""

import itertools
import math
import re
import sys
from pathlib import Path

from demo.sentences import DIGITS
from modules.errors import UserError

ID = re.compile(r"\w+-\w+-\d+\s+")  # of a line of LibriSpeech's .trans.txt
APOSTROPHES = str.maketrans("\u2018\u2019\u02bc", "'''")
PUNCTUATION = re.compile(r"[.,;:!?\"()\[\]{}*_/\u2013\u2014\u201c\u201d\u2026-]+")
LETTERS = re.compile(r"[A-Z' ]*[A-Z][A-Z' ]*")
BEFORE = {"AND", "BUT", "WHICH", "WHO", "THAT", "WHEN", "WHERE", "FOR", "AS", "IF", "SO", "THEN"}


def read_texts(path, max_words):
    """Sentences of a text file, one a line, in capitals; longer ones are cut in even parts.

    A line may begin with an utterance's id, as in LibriSpeech's transcripts. Punctuation is
    dropped; a line with other characters than letters and apostrophes cannot be spoken as it is
    written, so it is left out, and the number of those is printed. Raises UserError when the file
    cannot be read, or when less than half of it is of use.
    """
    sentences, refused = [], []
    for number, line in enumerate(_lines(path), 1):
        text = ID.sub("", line.strip(), count=1).translate(APOSTROPHES).upper()
        words = [word for word in PUNCTUATION.sub(" ", text).split() if word.strip("'")]
        if not words:
            continue
        if LETTERS.fullmatch(" ".join(words)):
            sentences += _cut(words, max_words)
        else:
            refused.append(f"line {number}: {line.strip()[:60]!r}")
    if not sentences and not refused:
        raise UserError(f"{path} holds no text; expected an English sentence a line")
    if refused:
        what = f"{path}: lines with other characters than A to Z and apostrophe"
        if len(refused) > len(sentences):
            raise UserError(
                f"{what}: {len(refused)}, most of it, as {refused[0]}; expected English, with "
                "numbers written as words"
            )
        print(f"{what} that are left out: {len(refused)}, as {refused[0]}", file=sys.stderr)
    return sentences


def _lines(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"text {path} cannot be read ({error.strerror}); give a file with a sentence a line, "
            "or with lines such as LibriSpeech's: 19-198-0000 NORTHANGER ABBEY"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"text {path} is not UTF-8 at byte {error.start}; convert it, as with iconv"
        ) from error


def _cut(words, longest):
    parts = math.ceil(len(words) / longest)
    ends = [round(i * len(words) / parts) for i in range(parts + 1)]
    return [" ".join(words[a:b]) for a, b in itertools.pairwise(ends)]


def digit_strings(rng, count):
    """Strings of 3 to 8 digits, as words."""
    return [" ".join(rng.choices(DIGITS, k=rng.randint(3, 8))) for _ in range(count)]


def repeated(texts):
    """draw(rng, count) of texts in random order: all of them before any comes again."""

    def draw(rng, count):
        drawn = []
        while len(drawn) < count:
            drawn += rng.sample(texts, len(texts))
        return drawn[:count]

    return draw


def punctuate(text, rng):
    """Put commas where a reader might pause: they change melody and pace, too."""
    words, since = text.lower().split(), 0
    for i, word in enumerate(words[:-3], 1):
        since += 1
        likely = 0.5 if words[i].upper() in BEFORE else 0.05
        if since > 2 and rng.random() < likely:
            words[i - 1], since = f"{word},", 0
    return " ".join(words)
