"""CTC searches: best path, beam search, word n-grams."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modules.errors import UserError
from modules.search import CTCSearch, ctc_greedy

BOS, EOS = 1, 2
LABELS = ["<blank>", "<bos>", "<eos>", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", " "]


def frames_of(text, repeat=1, sharpness=12.0):
    """Log-probabilities (T, 31) that spell a text, a blank after each letter."""
    ids = [i for c in text for i in [LABELS.index(c)] * repeat + [0]]
    return (sharpness * F.one_hot(torch.tensor(ids, dtype=torch.long), len(LABELS))).log_softmax(-1)


def spell(ids):
    return " ".join("".join(LABELS[i] for i in ids).split())


def as_batch(utterances, filler=float("nan")):
    lengths = torch.tensor([len(x) for x in utterances])
    batch = torch.full((len(utterances), int(lengths.max()) + 3, len(LABELS)), filler)
    for row, x in zip(batch, utterances, strict=True):
        row[: len(x)] = x
    return batch, lengths


TEXTS = ["HELLO  THERE", " IT'S A BEE ", "", " ", "AAB"]


@pytest.mark.parametrize("beam_size", [1, 100])
def test_ctc_reads_peaky_frames(beam_size):
    batch, lengths = as_batch([frames_of(text, repeat=2) for text in TEXTS])
    expected = [" ".join(text.split()) for text in TEXTS]
    assert CTCSearch(LABELS, beam_size=beam_size)(batch, lengths) == expected
    assert [spell(ids) for ids in ctc_greedy(batch, lengths)] == expected


def test_ctc_batch_equals_single_at_every_length():
    """SpeechBrain's own batch call drops the last frame at some of these lengths."""
    search = CTCSearch(LABELS, beam_size=4)
    text = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2
    frames = frames_of(text)[::2]
    for total in (29, 41, 47):
        batch = frames[:total].expand(total, -1, -1)
        lengths = torch.arange(1, total + 1)
        expected = [text[:n] for n in range(1, total + 1)]
        assert search(batch, lengths) == expected
        assert [spell(ids) for ids in ctc_greedy(batch, lengths)] == expected
    torch.manual_seed(0)
    noisy = [(3 * torch.randn(n, len(LABELS))).log_softmax(-1) for n in (17, 12, 1, 0)]
    batch, lengths = as_batch(noisy, filler=7.0)
    together = search(batch, lengths)
    assert together == [search(x[None], n[None])[0] for x, n in zip(noisy, lengths, strict=True)]
    assert together[-1] == "" and ctc_greedy(batch, lengths)[-1] == []


def test_ctc_never_writes_bos_or_eos():
    frames = frames_of("AB")
    frames[:, [BOS, EOS]] = 0.0
    batch, lengths = frames[None], torch.tensor([len(frames)])
    assert CTCSearch(LABELS)(batch, lengths) == ["AB"]
    assert [spell(ids) for ids in ctc_greedy(batch, lengths)] == ["AB"]
    assert frames[0, BOS] == 0.0


def test_ctc_beam_beats_the_best_path():
    """Two frames of 0.6 blank, 0.4 A: path "--" has 0.36, but the paths of A sum to 0.64."""
    frames = torch.full((1, 2, len(LABELS)), 1e-9)
    frames[..., 0], frames[..., LABELS.index("A")] = 0.6, 0.4
    lengths = torch.tensor([2])
    assert ctc_greedy(frames.log(), lengths) == [[]]
    assert CTCSearch(LABELS)(frames.log(), lengths) == ["A"]


def test_ctc_beam_is_no_less_likely_than_the_best_path():
    """Frames between two or three candidates each; the judge is PyTorch's CTC loss."""
    search = CTCSearch(LABELS)
    wins = 0
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.full((1, 12, 31), -9.0)
        x.scatter_(2, torch.stack([torch.randperm(4)[:2] * 3 for _ in range(12)])[None], 0.0)
        x = (x + 0.2 * torch.randn(1, 12, 31)).log_softmax(-1)
        x[..., [BOS, EOS]] = float("-inf")
        beam = [LABELS.index(c) for c in search(x, torch.tensor([12]))[0]]
        greedy = ctc_greedy(x, torch.tensor([12]))[0]
        beam_score, greedy_score = (-ctc_loss(x, ids) for ids in (beam, greedy))
        assert beam_score >= greedy_score - 1e-4
        wins += beam_score > greedy_score + 1e-4
    assert wins >= 5


def ctc_loss(x, ids):
    return F.ctc_loss(
        x.transpose(0, 1),
        torch.tensor([ids]),
        torch.tensor([x.shape[1]]),
        torch.tensor([len(ids)]),
        reduction="sum",
    )


def test_ctc_takes_bfloat16_and_rejects_other_vocabularies():
    frames = frames_of("AB")[None]
    assert CTCSearch(LABELS)(frames.bfloat16(), torch.tensor([4])) == ["AB"]
    with pytest.raises(ValueError, match="31 tokens for 30 labels"):
        CTCSearch(LABELS[:-1])(frames, torch.tensor([4]))


def test_missing_ngram_package_and_file_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "modules.search.ctc.find_spec", lambda name: None if name == "kenlm" else name
    )
    (tmp_path / "binary.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5")
    with pytest.raises(UserError, match=r"pip install kenlm`, or give an \.arpa"):
        CTCSearch(LABELS, kenlm_model_path=str(tmp_path / "binary.bin"))
    with pytest.raises(UserError, match=r"no\.arpa is no file"):
        CTCSearch(LABELS, kenlm_model_path=str(tmp_path / "no.arpa"))
    (tmp_path / "words.arpa").write_text("words, and no numbers")
    with pytest.raises(UserError, match=r"words\.arpa holds no n-gram; python -m modules\.lm"):
        CTCSearch(LABELS, kenlm_model_path=str(tmp_path / "words.arpa"))
    (tmp_path / "bad.arpa").write_text("\\data\\\nwords, and no numbers")
    with pytest.raises(UserError, match=r"bad\.arpa is no ARPA file"):
        CTCSearch(LABELS, kenlm_model_path=str(tmp_path / "bad.arpa"))


ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
-1.0\t<s>\t-0.5
-1.0\t</s>\t0
-1.0\tSEE\t-0.5
-1.0\tSEA\t-0.5

\\2-grams:
-0.1\t<s> SEA
-2.0\t<s> SEE

\\end\\
"""


def test_an_ngram_decides_between_like_words(tmp_path):
    path = tmp_path / "bigram.arpa"
    path.write_text(ARPA)
    frames = frames_of("SEE").exp()
    frames[4, LABELS.index("E")], frames[4, LABELS.index("A")] = 0.55, 0.45
    batch, lengths = frames.log()[None], torch.tensor([len(frames)])
    assert CTCSearch(LABELS)(batch, lengths) == ["SEE"]
    assert CTCSearch(LABELS, kenlm_model_path=str(path), alpha=1.0)(batch, lengths) == ["SEA"]
