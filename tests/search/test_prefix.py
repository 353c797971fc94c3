"""CTC prefix scores: those of SpeechBrain's loop over frames, and those of PyTorch's CTC loss."""

import itertools

import pytest
import torch
from speechbrain.decoders.ctc import CTCPrefixScore
from torch.nn import functional as F  # noqa: N812

from modules.search.prefix import CTCPrefixScorer

BLANK, BOS, EOS, V = 0, 1, 2, 12


def make_log_probs(lengths, seed, spread=3.0, dtype=torch.float64):
    torch.manual_seed(seed)
    logits = spread * torch.randn(len(lengths), max(lengths), V, dtype=dtype)
    return logits.log_softmax(-1), torch.tensor(lengths)


def walk(log_probs, lengths, beam_size, steps, seed, repeat=0.5):
    """Scores of both scorers at each step of a random search in which tokens often repeat."""
    batch = len(lengths)
    ours = CTCPrefixScorer(log_probs, lengths, beam_size, BLANK, EOS)
    theirs, memory = CTCPrefixScore(log_probs.clone(), lengths, BLANK, EOS), None
    torch.manual_seed(seed)
    last = torch.full((batch * beam_size,), BOS)
    offsets = (torch.arange(batch) * beam_size).repeat_interleave(beam_size)
    for _ in range(steps):
        expected, memory = theirs.forward_step(last, memory)
        found = ours.score()
        yield found, expected, memory[1]
        local = torch.randint(beam_size, (batch * beam_size,))
        predecessors = offsets + local
        tokens = torch.randint(3, V, (batch * beam_size,))
        again = (torch.rand(batch * beam_size) < repeat) & (last[predecessors] > EOS)
        tokens = torch.where(again, last[predecessors], tokens)
        memory = theirs.permute_mem(memory, (local * V + tokens).view(batch, beam_size))
        ours.advance(predecessors, tokens)
        last = tokens


@pytest.mark.parametrize("lengths", [(9, 5, 1), (1,), (2, 2), (40, 33)])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_every_score_equals_speechbrains(lengths, beam_size):
    """Where a prefix is possible at all: SpeechBrain has -1e20 for what cannot be."""
    compared, steps = 0, min(6, max(lengths))  # SpeechBrain cannot go on past the frames
    for seed in range(3):
        log_probs, frames = make_log_probs(lengths, seed)
        for found, expected, psi in walk(log_probs, frames, beam_size, steps, seed):
            possible = (psi > -1e10) & (expected > -1e10) & (expected < 1e10)
            # SpeechBrain's sums are float32.
            torch.testing.assert_close(
                found[possible], expected.to(found)[possible], rtol=1e-5, atol=1e-4
            )
            impossible = (psi < -1e10) & (psi.amax(1, keepdim=True) > -1e10)
            assert (found[impossible] == -float("inf")).all()
            assert not found.isnan().any()
            compared += int(possible.sum())
    assert compared > 30


def test_long_peaky_input_keeps_its_precision():
    """Log-probabilities add up to -2e4 over these frames; float32 input, float64 truth."""
    log_probs, lengths = make_log_probs((700, 650), 0, spread=12.0, dtype=torch.float32)
    scorer = CTCPrefixScorer(log_probs, lengths, 1, BLANK, EOS)
    prefix = torch.randint(3, V, (2, 60), generator=torch.Generator().manual_seed(1))
    total = torch.zeros(2, dtype=torch.float64)
    for tokens in [*prefix.t(), torch.tensor([EOS, EOS])]:
        total += scorer.score().gather(1, tokens.unsqueeze(1)).squeeze(1)
        scorer.advance(torch.arange(2), tokens)
    expected = -F.ctc_loss(
        log_probs.double().transpose(0, 1),
        prefix,
        lengths,
        torch.tensor([60, 60]),
        reduction="none",
    )
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-4)


def test_scores_of_prefixes_sum_the_probability_of_what_begins_so():
    """exp(psi(g)) is the sum, over all texts that begin with g, of their CTC likelihoods."""
    log_probs, lengths = make_log_probs((4,), 3)
    tokens = (3, 4)
    allowed = log_probs.exp()[..., [0, *tokens]]
    log_probs = torch.full_like(log_probs, -float("inf"))
    log_probs[..., [0, *tokens]] = (allowed / allowed.sum(-1, keepdim=True)).log()
    likelihood = {}
    for length in range(5):
        for text in itertools.product(tokens, repeat=length):
            loss = F.ctc_loss(
                log_probs.transpose(0, 1),
                torch.tensor([text], dtype=torch.long).view(1, -1),
                lengths,
                torch.tensor([length]),
                reduction="sum",
            )
            likelihood[text] = torch.exp(-loss)
    for prefix in [(3,), (3, 3), (4, 3), (3, 4, 3)]:
        scorer = CTCPrefixScorer(log_probs, lengths, 1, BLANK, EOS)
        score = 0.0
        for token in prefix:
            score += scorer.score()[0, token]
            scorer.advance(torch.tensor([0]), torch.tensor([token]))
        begins = [p for text, p in likelihood.items() if text[: len(prefix)] == prefix]
        torch.testing.assert_close(score.exp(), sum(begins))
        torch.testing.assert_close((score + scorer.score()[0, EOS]).exp(), likelihood[prefix])


def test_a_dead_prefix_stays_dead():
    """More tokens than frames: nothing is possible, and nothing is NaN."""
    log_probs, lengths = make_log_probs((2, 5), 0)
    scorer = CTCPrefixScorer(log_probs, lengths, 2, BLANK, EOS)
    for _ in range(4):
        scores = scorer.score()
        scorer.advance(torch.arange(4), torch.full((4,), 3))
    assert (scores[:2] == -float("inf")).all() and not scores.isnan().any()
    assert scorer.score()[2:, EOS].isneginf().all()  # four times one token needs seven frames
