"""The CTC loss looks at a few columns of the logits, and equals the one that looks at all.

The loss of the decoder equals SpeechBrain's.
"""

import math

import pytest
import torch
from speechbrain.nnet import losses

from modules.lengths import relative, valid_frames, zero_padding
from modules.losses import ctc_loss, sequence_loss, too_few_frames
from modules.ops import ctc


def reference(logits, tokens, lengths, token_lengths, blank_index=0):
    return losses.ctc_loss(
        logits.log_softmax(-1),
        tokens,
        relative(lengths, logits.shape[1]),
        relative(token_lengths, tokens.shape[1]),
        blank_index,
        reduction="batchmean",
    )


def utterances(B, T, U, V, kinds=None, seed=0):
    """Logits and tokens of all lengths; with few kinds of tokens many are repeated."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, kinds or V, (B, U), generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    token_lengths = torch.randint(0, U + 1, (B,), generator=generator)
    token_lengths[0] = U
    lengths[0] = T
    return logits, tokens, lengths, token_lengths


def with_gradient(loss, logits, *arguments, **options):
    """A loss and its gradient; three times the loss, for a gradient from above counts too."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, *arguments, **options)
    (3 * value).backward()
    return value.detach(), logits.grad


# The last two have more tokens than the vocabulary.
SIZES = [(6, 20, 5, 40, 4), (6, 20, 5, 40, 2), (9, 7, 6, 30, 3), (4, 1, 2, 9, 3), (5, 12, 9, 5, 5)]
SIZES += [(5, 30, 4, 5, 5)]


@pytest.mark.parametrize("at_once", [2**23, 1])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_loss_of_all_columns(size, at_once, monkeypatch):
    monkeypatch.setattr(ctc.pytorch, "utterances_at_once", lambda logits: at_once)
    for seed in range(10):
        batch = utterances(*size, seed=seed)
        assert_equal(with_gradient(ctc_loss, *batch), with_gradient(reference, *batch))


def assert_equal(result, expected):
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


def test_the_sizes_cover_what_is_special():
    batches = [utterances(*size, seed=seed)[1:] for size in SIZES for seed in range(10)]
    short = torch.cat([too_few_frames(t, n, u) for t, n, u in batches])
    assert 30 < short.sum() < len(short) - 30
    assert sum(int((u == 0).sum()) for *_, u in batches) > 10
    assert sum(int((n == 1).sum()) for _, n, _ in batches) > 10


@pytest.mark.parametrize("vocabulary", [30, 6])
def test_another_blank(vocabulary):
    logits, tokens, lengths, token_lengths = utterances(5, 16, 5, vocabulary, kinds=4)
    batch = logits, tokens - 1, lengths, token_lengths
    blank = {"blank_index": vocabulary - 1}
    assert_equal(
        with_gradient(ctc_loss, *batch, **blank), with_gradient(reference, *batch, **blank)
    )


def test_no_tokens_at_all():
    logits, _, lengths, _ = utterances(3, 8, 1, 7)
    none, zero = torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    value, grad = with_gradient(ctc_loss, logits, none, lengths, zero)
    blanks = (logits.log_softmax(-1)[..., 0] * valid_frames(lengths, 8)).sum()
    torch.testing.assert_close(value, -blanks / 3)
    assert_equal((value, grad), with_gradient(ctc_loss, logits, none.new_ones(3, 2), lengths, zero))


def test_an_utterance_of_too_few_frames_has_no_gradient():
    logits, tokens, lengths, token_lengths = utterances(3, 9, 4, 20)
    tokens[1], token_lengths[1], lengths[1] = 5, 4, 6
    _, grad = with_gradient(ctc_loss, logits, tokens, lengths, token_lengths)
    assert too_few_frames(tokens, lengths, token_lengths)[1]
    assert not grad[1].any()
    assert grad[0].any()


def test_gradcheck():
    logits, tokens, lengths, token_lengths = utterances(3, 6, 3, 8, kinds=3)
    logits = logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ctc_loss(x, tokens, lengths, token_lengths), logits, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(dtype):
    """The loss is taken in float32 of the logits as they are; the gradient is rounded once."""
    logits, *rest = utterances(6, 50, 12, 200)
    logits = logits.to(dtype)
    value, grad = with_gradient(ctc_loss, logits, *rest)
    expected, expected_grad = with_gradient(reference, logits.double(), *rest)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    # Half a unit of the last place; where softmax and posterior cancel, float32's error.
    torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [40, 6])
def test_padding_has_no_influence(vocabulary, dtype):
    logits, tokens, lengths, token_lengths = utterances(5, 20, 6, vocabulary)
    logits = logits.to(dtype)
    padding = ~valid_frames(lengths, 20)
    expected = with_gradient(
        ctc_loss, zero_padding(logits, lengths), tokens, lengths, token_lengths
    )
    logits[padding] = math.nan
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 3), value=math.nan)
    tokens = tokens.masked_fill(~valid_frames(token_lengths, 6), -1)
    tokens = torch.nn.functional.pad(tokens, (0, 2), value=10**6)
    value, grad = with_gradient(ctc_loss, logits, tokens, lengths, token_lengths)
    assert torch.equal(value, expected[0])
    assert torch.equal(grad[:, :20], expected[1])
    assert not grad[:, :20][padding].any()
    assert not grad[:, 20:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_infinity_in_a_frame_makes_the_loss_nan(value):
    logits, *rest = utterances(3, 9, 4, 20)
    logits[0, 2, 19] = value
    assert ctc_loss(logits, *rest).isnan()


def test_nothing_is_computed_for_a_gradient_that_nobody_wants():
    batch = utterances(3, 9, 4, 20)
    assert not ctc_loss(*batch).requires_grad
    with torch.no_grad():
        assert_equal(ctc_loss(batch[0].requires_grad_(), *batch[1:]), reference(*batch))


def test_under_autocast():
    batch = utterances(3, 9, 4, 20)
    logits = batch[0].bfloat16()
    expected = with_gradient(ctc_loss, logits, *batch[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = with_gradient(ctc_loss, logits, *batch[1:])
    assert_equal(result, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9, 1.0])
def test_the_decoders_loss_is_speechbrains(smoothing):
    """Value and gradient, of its `kldiv_loss` with smoothing and of its `nll_loss` without."""
    torch.manual_seed(0)
    tokens, lengths = torch.randint(1, 50, (4, 9)), torch.tensor([9, 1, 4, 7])
    tokens = zero_padding(tokens, lengths)
    if smoothing:
        tokens[0, 3] = 0  # padding to `kldiv_loss`, wherever it stands
    scores = torch.randn(4, 9, 50, dtype=torch.float64, requires_grad=True)
    found = []
    for ours in (True, False):
        log_probs = scores.log_softmax(dim=-1)
        if ours:
            loss = sequence_loss(log_probs, tokens, lengths, smoothing)
        elif smoothing:
            options = {"label_smoothing": smoothing, "reduction": "batchmean"}
            loss = losses.kldiv_loss(log_probs, tokens, **options)
        else:
            each = losses.nll_loss(log_probs, tokens, relative(lengths, 9), reduction="batch")
            loss = (each * lengths).sum() / len(lengths)
        found.append((loss, *torch.autograd.grad(loss, scores)))
    torch.testing.assert_close(*found)
    assert not found[0][1][~valid_frames(lengths, 9)].any()
