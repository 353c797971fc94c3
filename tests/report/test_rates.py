"""Rates are SpeechBrain's; intervals are as wide as statistics wants them."""

import numpy as np
import pytest

from inference.report.alignments import read_alignments
from inference.report.rates import (
    character_counts,
    difference,
    distances,
    estimate,
    word_counts,
)
from tests.report.written import ODD, sentences, stats, wer_text


def test_wer_and_cer_are_speechbrains(tmp_path):
    found = sentences(np.random.default_rng(1), 50, ODD)
    (tmp_path / "wer_t.txt").write_text(wer_text(found))
    utterances = read_alignments(tmp_path / "wer_t.txt")
    wer, cer = (estimate([count(utterances)]) for count in (word_counts, character_counts))
    assert wer.value == pytest.approx(stats(found).summarize("error_rate"))
    assert cer.value == pytest.approx(stats(found, split_tokens=True).summarize("error_rate"))
    assert wer.low < wer.value < wer.high


def test_distances():
    assert distances([("", ""), ("", "AB"), ("AB", ""), ("KITTEN", "SITTING"), ("AB", "BA")]) == [
        *(0, 2, 2, 3, 2)
    ]


def bernoulli(rate, count, seed):
    """(N, 2): utterances of one word, wrong with a probability."""
    wrong = np.random.default_rng(seed).random(count) < rate
    return np.stack([wrong, np.ones(count)], axis=1).astype(np.int64)


def test_an_interval_is_that_of_independent_words():
    found = estimate([bernoulli(0.2, 400, seed=0)])
    p = found.value / 100
    width = 100 * 2 * 1.96 * np.sqrt(p * (1 - p) / 400)
    assert found.high - found.low == pytest.approx(width, rel=0.05)
    assert estimate([bernoulli(0.2, 400, seed=0)]) == found


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = [
        e.low <= 20 <= e.high for e in (estimate([bernoulli(0.2, 150, s)]) for s in range(40))
    ]
    assert 0.87 <= np.mean(inside) <= 0.99


def test_seeds_that_differ_widen_it():
    one = bernoulli(0.2, 400, seed=0)
    same, other = (
        estimate([one, one, one]),
        estimate([one, bernoulli(0.3, 400, 1), bernoulli(0.1, 400, 2)]),
    )
    assert same.value == pytest.approx(estimate([one]).value)
    assert other.high - other.low > 1.5 * (same.high - same.low)
    assert other.runs == pytest.approx(
        [estimate([r]).value for r in (one, bernoulli(0.3, 400, 1), bernoulli(0.1, 400, 2))]
    )


def test_a_difference_is_of_the_same_utterances():
    ours = bernoulli(0.4, 300, seed=0)
    theirs = ours.copy()
    theirs[np.flatnonzero(ours[:, 0])[:10], 0] = 0  # ten errors fewer, all others the same
    found = difference([ours], [theirs])
    assert found.value == pytest.approx(100 * 10 / 300)
    assert 0 < found.low < found.value < found.high
    # Each alone is far less sure.
    assert found.high - found.low < 0.5 * (estimate([ours]).high - estimate([ours]).low)
    assert difference([ours], [ours]).low == difference([ours], [ours]).high == 0
