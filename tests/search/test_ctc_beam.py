"""The batched CTC beam search sums what the CTC loss sums, and loses nothing by batches."""

import itertools

import pytest
import torch
from speechbrain.decoders.ctc import CTCBeamSearcher
from torch.nn import functional as F  # noqa: N812

from modules.search.ctc_beam import PrefixBeams, ctc_beam

WIDE = {"beam_size": 200, "beam_prune_logp": -1e9, "token_prune_min_logp": -1e9}
RECIPE = {"beam_size": 100, "beam_prune_logp": -12.0, "token_prune_min_logp": -1.2}


def make_log_probs(lengths, vocab_size, seed, spread=2.0, dtype=torch.float64):
    torch.manual_seed(seed)
    logits = spread * torch.randn(len(lengths), max(lengths) + 2, vocab_size, dtype=dtype)
    log_probs = logits.log_softmax(-1)
    for row, length in zip(log_probs, lengths, strict=True):
        row[length:] = float("nan")
    return log_probs, torch.tensor(lengths)


def likelihood(log_probs, ids):
    """log p(ids) of frames (T, V)."""
    targets, frames = torch.tensor([ids], dtype=torch.long), torch.tensor([len(log_probs)])
    loss = F.ctc_loss(
        log_probs.unsqueeze(1), targets, frames, torch.tensor([len(ids)]), reduction="sum"
    )
    return -float(loss)


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_most_likely_text_of_all(seed):
    log_probs, lengths = make_log_probs((4, 3, 1, 0), 4, seed)
    found = ctc_beam(log_probs, lengths, **WIDE)
    for row, length, ids in zip(log_probs, lengths.tolist(), found, strict=True):
        texts = (x for n in range(length + 1) for x in itertools.product((1, 2, 3), repeat=n))
        if length:
            assert ids == list(max(texts, key=lambda x: likelihood(row[:length], x)))
        else:
            assert ids == []


def test_every_prefix_has_its_likelihood():
    """With room for all texts none is pruned, and each stands in the beam once."""
    log_probs, lengths = make_log_probs((4,), 3, 0)
    beams = PrefixBeams(1, 100, 4, 0, log_probs.device, log_probs.dtype)
    for t in range(4):
        beams.read(t, log_probs[:, t], lengths > t, -1e9)
    sums = torch.logaddexp(beams.b, beams.n)[0]
    texts = [x for n in range(5) for x in itertools.product((1, 2), repeat=n)]
    expected = [likelihood(log_probs[0, :4], x) for x in texts]
    expected = torch.tensor([x for x in expected if x > -1e9], dtype=sums.dtype)
    found = sums[sums > -1e9]
    torch.testing.assert_close(found.sort()[0], expected.sort()[0])
    assert len(beams.name[0][sums > -1e9].unique()) == len(found)
    torch.testing.assert_close(found.logsumexp(0), torch.zeros_like(found[0]))


@pytest.mark.parametrize("pruning", [RECIPE, {**WIDE, "beam_size": 3}])
def test_padded_batch_equals_single_utterance(pruning):
    log_probs, lengths = make_log_probs((30, 17, 1, 0), 12, 0)
    together = ctc_beam(log_probs, lengths, **pruning)
    for i, length in enumerate(lengths.tolist()):
        alone = ctc_beam(log_probs[i : i + 1, :length], lengths[i : i + 1], **pruning)
        assert alone == [together[i]]


@pytest.mark.parametrize("spread", [1.5, 3.0, 6.0])
def test_no_less_likely_than_speechbrains(spread):
    """Under the recipe's pruning both find the same; without, ours keeps more in a beam."""
    labels = ["<blank>", *"ABCDEFGHIJK"]
    for seed, pruning in itertools.product(range(3), [RECIPE, {**RECIPE, **WIDE, "beam_size": 20}]):
        log_probs, lengths = make_log_probs((40, 25), len(labels), seed, spread, torch.float32)
        theirs = CTCBeamSearcher(0, labels, **pruning)
        found = ctc_beam(log_probs, lengths, **pruning)
        for row, length, ids in zip(log_probs, lengths.tolist(), found, strict=True):
            text = theirs.decode_log_probs(row.numpy(), length)[0].text
            expected = [labels.index(c) for c in text]
            row = row[:length]
            if pruning is RECIPE:
                assert ids == expected
            assert likelihood(row, ids) >= likelihood(row, expected) - 1e-3


def test_pruned_tokens_are_never_tried():
    """Best path aside, only what is above the limit: here nothing."""
    log_probs, lengths = make_log_probs((20, 9), 8, 1, spread=0.2)
    found = ctc_beam(log_probs, lengths, 50, -1e9, token_prune_min_logp=0.0)
    best = log_probs[:, :20].argmax(2)
    for row, length, ids in zip(best, lengths.tolist(), found, strict=True):
        assert ids == [x for x, _ in itertools.groupby(row[:length].tolist()) if x]
