"""What a recogniser returns: a transcript, its words with times, and the lines they make."""

from dataclasses import dataclass, field
from itertools import pairwise

PAUSE = 0.8  # s, from which on a new segment begins
LONGEST = 7.0  # s, and
WIDEST = 84  # characters of a segment: two lines of a subtitle


@dataclass(frozen=True)
class Word:
    """A word from `start` to `end`, seconds, with a confidence in [0, 1] (`inference.align`)."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Segment:
    """Words without a long pause, short enough for a subtitle; `start` and `end` in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Final(Segment):
    """A segment of a stream that will not change any more, with its words."""

    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Partial:
    """What a stream has said so far.

    text, words : since the last final segment; more audio may still change their end.
    finals : the segments that this audio made final, each given once.
    """

    text: str
    words: tuple[Word, ...] = ()
    finals: tuple[Final, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """The words of one recording.

    text : words, one space apart; "" when nothing was heard.
    duration : seconds of audio.
    segments, words : tuples in the order of time.

    Transcripts of one text and duration are equal: times and confidences differ in their last
    digits between batches.
    """

    text: str
    duration: float
    segments: tuple[Segment, ...] = field(default=(), compare=False)
    words: tuple[Word, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Result:
    """What became of one of many files: a transcript, or the reason why there is none."""

    path: str
    transcript: Transcript | None = None
    error: str | None = None


def transcript_of(words, duration):
    """Words in the order of time -> Transcript."""
    text = " ".join(w.text for w in words)
    return Transcript(text, duration, tuple(segments(words)), tuple(words))


def segments(words):
    """Cut at every pause, and what is still too long at its longest pause: words -> segments."""
    if not words:
        return []
    text = " ".join(w.text for w in words)
    start, end = words[0].start, words[-1].end
    pauses = [b.start - a.end for a, b in pairwise(words)]
    longest = max(pauses, default=0.0)
    if not pauses or (longest < PAUSE and end - start <= LONGEST and len(text) <= WIDEST):
        return [Segment(text, start, end)]
    # Of equal pauses the one next to the middle.
    cut = max(range(len(pauses)), key=lambda i: (pauses[i], -abs(2 * i + 1 - len(pauses)))) + 1
    return segments(words[:cut]) + segments(words[cut:])
