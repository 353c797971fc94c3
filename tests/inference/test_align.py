"""Words get the times of their frames, and confidences in [0, 1]."""

from itertools import pairwise

import pytest
import torch

from inference.align import align
from modules.tokenizer import CharacterTokenizer, SubwordTokenizer

LETTERS = CharacterTokenizer("'ABC ")


def certain(path, tokens, probability=0.9):
    """Log-probabilities (T, V) of a path: so much for its token, the rest for the others."""
    others = (1 - probability) / (tokens - 1)
    p = torch.full((len(path), tokens), others)
    p[torch.arange(len(path)), torch.tensor(path)] = probability
    return p.log()


def test_times_are_those_of_the_frames():
    a, b, space = LETTERS.encode("AB ")
    #       A A     B                B B      A
    path = [0, 0, a, a, 0, b, 0, space, 0, b, 0, b, 0, a, 0, 0]
    ids = LETTERS.encode("AB BBA")
    words = align(ids, certain(path, len(LETTERS)), 0.04, 0.64, LETTERS)
    assert [w.text for w in words] == ["AB", "BBA"]
    # Frame t is the time around t x 40 ms.
    assert [(w.start, w.end) for w in words] == [
        pytest.approx((0.06, 0.22)),
        pytest.approx((0.34, 0.54)),
    ]
    assert [w.confidence for w in words] == pytest.approx([0.9, 0.9])


def test_confidence_is_of_the_tokens_alone():
    a, b, space = LETTERS.encode("AB ")
    log_probs = certain([a, 0, b, 0, space, 0, b], len(LETTERS), 0.99)
    log_probs[2] = certain([b], len(LETTERS), 0.4)
    log_probs[4] = certain([space], len(LETTERS), 0.3)
    words = align(LETTERS.encode("AB B"), log_probs, 0.04, 1.0, LETTERS)
    assert [w.confidence for w in words] == pytest.approx([(0.99 + 0.4) / 2, 0.99])


def test_times_stay_within_the_recording():
    a = LETTERS.encode("A")[0]
    (word,) = align([a], certain([a, a], len(LETTERS)), 0.04, 0.045, LETTERS)
    assert (word.start, word.end) == (0.0, 0.045)


def test_nothing_heard_and_more_tokens_than_frames():
    log_probs = certain([0] * 4, len(LETTERS))
    assert align([], log_probs, 0.04, 0.16, LETTERS) == []
    words = align(LETTERS.encode("AAA B"), log_probs, 0.04, 0.16, LETTERS)
    assert [(w.text, w.confidence) for w in words] == [("AAA", 0.0), ("B", 0.0)]
    assert 0 <= words[0].start < words[0].end <= words[1].start < words[1].end <= 0.16


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_words_of_sentencepiece_are_the_text(kind, tmp_path):
    texts = ["A CAB A BAD BED", "DEAD BEEF FACE", "ABE BEADED A FADE", "CAB BED ACE AD"]
    tokenizer = SubwordTokenizer({"unigram": 16, "bpe": 16, "char": 10}[kind], kind)
    tokenizer.train(texts, tmp_path / "tokenizer.model")
    for text in texts:
        ids = tokenizer.encode(text)
        path = [x for i in ids for x in (i, 0)]
        words = align(ids, certain(path, len(tokenizer)), 0.04, len(path) * 0.04, tokenizer)
        assert " ".join(w.text for w in words) == text == tokenizer.decode(ids)
        assert all(0 <= w.start < w.end <= v.start for w, v in pairwise(words))
