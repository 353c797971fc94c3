"""Windows hold all of a recording, in bounded memory, and their words join without loss."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from inference.transcript import Word
from inference.windows import SAME, Window, join, joined, limits, moved, settled, windows
from modules.errors import UserError

RATE = 16000


def noise(seconds, loudness=0.3):
    return loudness * np.random.default_rng(0).standard_normal(int(seconds * RATE))


def cut_up(x, window, block=RATE):
    blocks = torch.from_numpy(x.astype(np.float32)).split(block)
    return list(windows(iter(blocks), None if window is None else int(window * RATE), RATE))


@pytest.mark.parametrize("block", [999, RATE, 15 * RATE])
@pytest.mark.parametrize("window", [2, 7.3, 30])
@pytest.mark.parametrize("silences", [True, False])
def test_windows_hold_every_sample(window, block, silences):
    parts = [noise(0.9), np.zeros(RATE // 2)] if silences else [noise(1.4)]
    x = np.concatenate(parts * 20)
    found = cut_up(x, window, block)
    end = 0
    for w in found:
        assert w.start + w.overlap == end  # no gap, and what is shared is told
        assert 0 < len(w.x) <= window * RATE
        np.testing.assert_array_equal(w.x, x.astype(np.float32)[w.start : w.start + len(w.x)])
        end = w.start + len(w.x)
    assert end == len(x)
    if len(found) > 1:
        assert any(w.overlap for w in found) != silences


def test_cuts_are_in_silence():
    x = np.concatenate([noise(3), np.zeros(RATE // 2), noise(4), np.zeros(RATE // 2), noise(3)])
    x += noise(len(x) / RATE, 0.003)
    first, second = cut_up(x, 6), cut_up(x, 8)
    assert [w.start / RATE for w in first] == pytest.approx([0, 3.25, 7.75], abs=0.2)
    assert [w.start / RATE for w in second] == pytest.approx([0, 7.75], abs=0.2)


def test_pure_silence_and_no_window():
    assert not any(w.overlap for w in cut_up(np.zeros(25 * RATE), 10))
    assert len(cut_up(noise(25), None)) == 1


def test_blocks_are_read_when_needed():
    read = 0

    def blocks():
        nonlocal read
        for _ in range(3600):
            read += 1
            yield torch.from_numpy(noise(1).astype(np.float32))

    for w in windows(blocks(), 10 * RATE, RATE):
        heard = (w.start + len(w.x)) / RATE
        assert read <= heard + 10
    assert read == 3600


def spoken(texts, length=0.3, gap=0.1):
    """Words one after another from 0 s."""
    return [
        Word(t, i * (length + gap), i * (length + gap) + length, 1.0) for i, t in enumerate(texts)
    ]


def jittered(words, random):
    return [
        Word(w.text, w.start + d, w.end + d, 1.0)
        for w, d in zip(words, random.uniform(-0.06, 0.06, len(words)), strict=True)
    ]


@pytest.mark.parametrize("texts", ["A B C D E F G H I J K L", "A A A A B B A A A A A A"])
def test_a_seam_loses_and_doubles_nothing(texts):
    texts, random = texts.split(), np.random.default_rng(0)
    words = spoken(texts)
    for _ in range(300):
        start = random.uniform(0, 2.5)
        end = start + random.uniform(0.8, 2)
        # A window hears whole words, each where it is, a little off.
        before = jittered([w for w in words if w.end <= end], random)
        after = jittered([w for w in words if w.start >= start], random)
        joined = join(before, after, start, end)
        assert [w.text for w in joined] == texts
        assert all(a.end < b.start + 2 * 0.06 for a, b in pairwise(joined))


def test_settled_words_stay():
    random, words, most = np.random.default_rng(0), spoken("ABCDEFGHIJKL"), 0
    for _ in range(300):
        length, shared = int(random.uniform(2, 4) * RATE), int(random.uniform(0.8, 2) * RATE)
        window = Window(0, np.zeros(length, np.float32), 0, shared)
        after = Window(length - shared, np.zeros(4 * RATE, np.float32), shared)
        before = jittered([w for w in words if w.end <= length / RATE], random)
        heard = [w for w in words if w.start >= after.start / RATE]
        new = moved(jittered(heard, random), -after.start / RATE)
        count = settled(before, window, RATE)
        assert joined(before, after, new, RATE)[:count] == before[:count]
        most = max(most, count)
        assert settled(before, replace(window, shared=0), RATE) == len(before)
    assert most > 5


def test_half_a_word_at_an_edge_goes():
    words = spoken(["ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX"])
    before = [*words[:4], Word("FI", 1.6, 1.7, 0.2)]  # cut off at 1.7 s
    after = [Word("O", 0.5, 0.7, 0.2), *words[2:]]  # begins in the middle of TWO
    assert [w.text for w in join(before, after, 0.5, 1.7)] == [w.text for w in words]


def test_words_heard_differently_are_neither_lost_nor_doubled():
    before = [Word("A", 0, 0.3, 1.0), Word("BED", 0.8, 1.15, 1.0)]
    after = [Word("BAD", 0.85, 1.2, 1.0), Word("C", 1.6, 1.9, 1.0)]
    for middle in (0.9, 0.97, 1.0, 1.03, 1.1):
        joined = join(before, after, middle - 0.5, middle + 0.5)
        assert [w.text[0] for w in joined] == ["A", "B", "C"]


def test_windows_that_share_nothing_follow_each_other():
    before, after = [Word("NO", 0.85, 1.0, 1.0)], [Word("NO", 1.02, 1.15, 1.0)]
    assert after[0].start - before[0].start < SAME
    assert join(before, after, 1.0, 1.0) == [*before, *after]
    assert join([], after, 0.0, 0.0) == after


def test_limits():
    assert limits(None, 35, 17) == (35, 17)
    assert limits(None, 4, 17) == (17, 17)
    assert limits(10.0) == (10.0, 10.0)
    assert limits(0) == (float("inf"), None)
    for wrong in (1, -3, float("nan"), float("inf")):
        with pytest.raises(UserError, match="give 2 or more, or 0"):
            limits(wrong)
