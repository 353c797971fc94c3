"""Subword tokenizers: what text they take, and how many units they can have."""

import re

import pytest

from modules.errors import UserError
from modules.tokenizer import SubwordTokenizer

# Unicode calls these equal to other characters, which a transcript does not have.
TEXTS = ["\ufb01sch na\u0308he", "\u2460 half \u00bd \u2026", "\uff46ull \u1112\u1161\u11ab"]


def trained(units, kind, path):
    tokenizer = SubwordTokenizer(units, kind)
    tokenizer.train(TEXTS * 20, path)
    return tokenizer


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char", "word"])
def test_text_is_taken_as_it_is(kind, tmp_path):
    """And so many units as the message names can be had."""
    with pytest.raises(UserError, match=r"set --output_neurons \d+$") as refused:
        trained(500, kind, tmp_path / "model")
    tokenizer = trained(int(re.findall(r"\d+", str(refused.value))[-1]), kind, tmp_path / "model")
    tokenizer.check(TEXTS)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_too_few_units_for_the_characters(tmp_path):
    with pytest.raises(UserError, match=r"no bpe tokenizer of 5 units .* to what the text allows"):
        trained(5, "bpe", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("size", [6, 9])
def test_a_unit_for_every_character_and_no_other(tmp_path, size):
    """SentencePiece would leave the rarest out, and every text that has them is then refused."""
    with pytest.raises(UserError, match=r"have 7 units of token_type=char.*--output_neurons 7"):
        SubwordTokenizer(size, "char").train(["ABA ABA", "BAC"] * 50, tmp_path / "tokenizer.ckpt")
    assert not list(tmp_path.iterdir())
