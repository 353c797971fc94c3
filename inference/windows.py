"""Long audio -> windows that a model hears one by one, and the windows' words -> one sequence.

A window ends in a silence where there is one. Where there is none it overlaps with the next, and
both hear the words at the seam.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modules.errors import UserError

WHOLE = 40  # s of a recording that is heard in one piece, and
WINDOW = 30  # s of longer ones' windows, for a package that does not tell what its training heard
SHORTEST = 2  # s of a window
STEP = 0.01  # s, of the loudness
SILENCE = 0.2  # s that are silent around a cut
DROP = 20.0  # dB that silence lies under speech
LOWEST = 1e-4  # of full scale: what is quieter is silent, however soft the speech
OVERLAP = (1.0, 5.0)  # s where there is no silence: a quarter of the window, in these limits
SAME = 0.25  # s by which two windows' times of one word may differ


def limits(chunk_seconds, whole_seconds=WHOLE, window_seconds=WINDOW):
    """The longest recording that is heard in one piece, and the window of longer ones, seconds.

    chunk_seconds: both of these; 0: all in one piece; None: the other two numbers.
    """
    if chunk_seconds is None:
        return max(whole_seconds, window_seconds), window_seconds
    if chunk_seconds == 0:
        return float("inf"), None
    if not SHORTEST <= chunk_seconds < float("inf"):
        raise UserError(
            f"chunk_seconds={chunk_seconds} is too short to hear words in, or no number; give "
            f"{SHORTEST} or more, or 0 for one piece"
        )
    return chunk_seconds, chunk_seconds


@dataclass(frozen=True)
class Window:
    """Samples x (N,), array or tensor, from sample `start` of a recording on.

    The first `overlap` of them the window before has heard, the last `shared` the next one will.
    """

    start: int
    x: Any
    overlap: int
    shared: int = 0


def windows(blocks, size, rate):
    """Blocks (N,) at `rate` Hz -> Windows of at most `size` samples, as they come.

    size None: one window.
    """
    held, count, start, overlap = [], 0, 0, 0
    for block in blocks:
        held.append(block)
        count += len(block)
        while size is not None and count > size:
            x = together(held)
            end, shared = cut(x[:size], rate)
            yield Window(start, together([x[:end]]), overlap, shared)
            held, start, overlap = [x[end - shared :]], start + end - shared, shared
            count = len(held[0])
    yield Window(start, together(held), overlap)


def together(blocks):
    """Arrays or tensors (N,) -> a new one that holds them all."""
    if isinstance(blocks[0], np.ndarray):
        return np.concatenate(blocks)
    import torch  # not needed for arrays

    return torch.cat(blocks)


def cut(x, rate):
    """Where a window ends, and how much of it the next one hears again, in samples.

    x (N,): all that the window may hold. In its later half the quietest place is looked for.
    """
    step = int(STEP * rate)
    frames = np.asarray(x[: len(x) // step * step]).reshape(-1, step)
    loudness = np.sqrt(np.square(frames).mean(axis=1))
    if len(loudness) >= 3 * int(SILENCE / STEP):
        limit = max(np.quantile(loudness, 0.9) * 10 ** (-DROP / 20), LOWEST)
        width = int(SILENCE / STEP)
        # The loudest of every `width` frames: a place is as quiet as all around it.
        around = np.lib.stride_tricks.sliding_window_view(loudness, width).max(axis=1)
        first = len(around) // 2
        place = first + int(around[first:].argmin())
        if around[place] <= limit:
            return (place + width // 2) * step, 0
    least, most = (int(s * rate) for s in OVERLAP)
    return len(x), min(max(len(x) // 4, least), most)


def joined(words, window, new, rate):
    """Words so far, the next window and the words heard in it -> the words of both."""
    start = window.start / rate
    return join(words, moved(new, start), start, start + window.overlap / rate)


def settled(words, window, rate):
    """How many of the words up to a window's end no later window changes."""
    if not window.shared:
        return len(words)
    start = (window.start + len(window.x) - window.shared) / rate
    return sum(centre(w) <= start - SAME for w in words)


def join(before, after, start, end):
    """Words of two windows that share the time from `start` to `end` -> one sequence.

    Windows that share nothing follow each other.
    The seam is a word that both heard, the one next to the middle. Where there is none, words of
    the first half are the earlier window's, and the later one's begin where those end.
    """
    if start >= end:
        return [*before, *after]
    middle = (start + end) / 2
    pairs = [
        (i, j)
        for i, a in enumerate(before)
        if centre(a) > start - SAME
        for j, b in enumerate(after)
        if centre(b) < end + SAME and a.text == b.text and abs(centre(a) - centre(b)) < SAME
    ]
    if pairs:
        i, j = min(pairs, key=lambda p: (off(before, after, *p, middle), p))
        return [*before[: i + 1], *(later(w, before[i].end) for w in after[j + 1 :])]
    kept = [w for w in before if centre(w) < middle]
    seam = max(kept[-1].end if kept else 0.0, start)
    return [*kept, *(later(w, seam) for w in after if centre(w) >= seam)]


def off(before, after, i, j, middle):
    """How far a pair is from the middle; two times of one word that differ count as well."""
    a, b = centre(before[i]), centre(after[j])
    return abs((a + b) / 2 - middle) + 4 * abs(a - b)


def centre(word):
    return (word.start + word.end) / 2


def later(word, time):
    """A word that begins no earlier than a time."""
    if word.start >= time:
        return word
    return replace(word, start=time, end=max(word.end, time))


def moved(words, seconds):
    """Words heard in a window -> words of the recording."""
    return [replace(w, start=w.start + seconds, end=w.end + seconds) for w in words]
