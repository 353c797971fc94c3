"""CTC by Triton equals PyTorch's in float64, losses and gradients.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import math

import pytest
import torch

from modules.errors import UserError
from modules.lengths import valid_frames
from modules.ops.ctc import ctc
from tests.ops.interpreted import (
    DEVICE,
    compile_kernel,
    gpu,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 25


def utterances(B, T, U, C, kinds, seed=0, blank=0):
    """Scores (float64) and labels of all lengths; of few kinds, many are repeated."""
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(B, T, C, generator=generator, dtype=torch.float64)).log_softmax(2)
    labels = (torch.randint(1, kinds, (B, U), generator=generator) + blank) % C
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    label_lengths = torch.randint(0, U + 1, (B,), generator=generator)
    lengths[0], label_lengths[-1] = T, U
    return [x.to(DEVICE) for x in (scores, labels, lengths, label_lengths)]


def compare(scores, labels, lengths, label_lengths, blank=0, tolerance=1e-4):
    """AssertionError unless Triton agrees; -> which utterances have a path"""
    batch = labels, lengths, label_lengths, blank
    expected, expected_grad = ctc(scores, *batch, backend="torch")
    loss, grad = ctc(scores.float(), *batch, backend="triton")
    found = expected.isfinite()
    assert torch.equal(loss.isposinf(), ~found)
    torch.testing.assert_close(loss[found].double(), expected[found], rtol=1e-6, atol=tolerance)
    counts = (valid_frames(lengths, scores.shape[1]) & found.view(-1, 1)).unsqueeze(2)
    assert not grad.masked_select(~counts).any()
    expected_grad = expected_grad.masked_fill(~counts, 0.0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=tolerance)
    alone, none = ctc(scores.float(), *batch, needs_grad=False, backend="triton")
    assert none is None and torch.equal(alone, loss)
    return found


@runs_kernels
@pytest.mark.parametrize("blank", [0, 3])
@pytest.mark.parametrize(
    "size", [(4, 9, 3, 6, 5), (5, 12, 6, 4, 2), (3, 1, 2, 5, 4), (3, 40, 20, 5, 5), (2, 5, 1, 4, 2)]
)
def test_equals_pytorch_in_double(size, blank):
    found = torch.cat([compare(*utterances(*size, s, blank), blank) for s in range(3)])
    assert found.any()


@runs_kernels
@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_as_many_labels_as_a_block_holds(count):
    """And one more or less; the last blank of 64 labels takes a second warp."""
    assert compare(*utterances(1, count + 10, count, count + 2, count + 2)).all()


@runs_kernels
def test_a_long_utterance():
    """Posteriors are parts of their frame's total, in which most of the rounding cancels."""
    batch = utterances(1, 200, 20, 20, 20)
    (_, expected), (_, grad) = (
        ctc(scores, *batch[1:], 0, backend=backend)
        for scores, backend in ((batch[0], "torch"), (batch[0].float(), "triton"))
    )
    assert (grad - expected).abs().max() < float32_error(*batch) / 4


@runs_kernels
def test_utterances_without_a_path():
    scores, labels, lengths, label_lengths = utterances(3, 6, 4, 5, 5)
    labels[1], label_lengths[:], lengths[:] = 2, 4, 6  # four equal ones want seven frames
    assert compare(scores, labels, lengths, label_lengths).tolist()[1] is False


@runs_kernels
def test_no_labels():
    scores, labels, lengths, label_lengths = utterances(3, 6, 0, 5, 5)
    compare(scores, labels, lengths, label_lengths)
    loss, _ = ctc(scores.float(), labels, lengths, label_lengths, 0, backend="triton")
    blanks = (scores[..., 0] * valid_frames(lengths, 6)).sum(1)
    torch.testing.assert_close(loss.double(), -blanks)


@runs_kernels
def test_no_frames():
    scores, labels, lengths, label_lengths = utterances(2, 3, 2, 5, 5)
    lengths[:], label_lengths[0], label_lengths[1] = 0, 0, 2
    loss, grad = ctc(scores.float(), labels, lengths, label_lengths, 0, backend="triton")
    assert loss.tolist() == [0.0, math.inf]
    assert not grad.any()


@runs_kernels
def test_what_is_past_a_length_is_not_read():
    scores, labels, lengths, label_lengths = utterances(3, 8, 3, 5, 5, seed=1)
    expected = ctc(scores.float(), labels, lengths, label_lengths, 0, backend="triton")
    past = ~valid_frames(lengths, 8)
    assert past.any()
    scores[past] = math.nan
    labels[~valid_frames(label_lengths, 3)] = 10**6
    got = ctc(scores.float(), labels, lengths, label_lengths, 0, backend="triton")
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@runs_kernels
def test_nan_stays_in_its_utterance():
    scores, labels, lengths, label_lengths = utterances(3, 8, 3, 5, 5)
    lengths[:] = 8
    scores[1, 4] = math.nan
    loss, grad = ctc(scores.float(), labels, lengths, label_lengths, 0, backend="triton")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().flatten(1).any(1).tolist() == [False, True, False]


@runs_kernels
@pytest.mark.parametrize("label", range(3))
def test_nan_of_one_label(label):
    """Is in the loss, though there are paths beside it."""
    scores, _, lengths, label_lengths = utterances(3, 8, 3, 5, 5)
    labels = torch.tensor([1, 2, 3], device=DEVICE).repeat(3, 1)
    lengths[:], label_lengths[:] = 8, 3
    scores[1, 4, label + 1] = math.nan
    loss, _ = ctc(scores.float(), labels, lengths, label_lengths, 0, backend="triton")
    assert loss.isnan().tolist() == [False, True, False]


@runs_kernels
def test_impossible_columns():
    """Scores of minus infinity: paths through them do not count."""
    scores, labels, lengths, label_lengths = utterances(3, 12, 2, 5, 4)
    scores[:, ::2, 1] = -1e4
    batch = labels, lengths, label_lengths, 0
    expected, expected_grad = ctc(scores, *batch, backend="torch")  # NaN of minus infinity
    scores[:, ::2, 1] = -math.inf
    loss, grad = ctc(scores.float(), *batch, backend="triton")
    found = expected < 5e3
    assert found.any()
    assert torch.equal(loss.isposinf(), ~found)
    counts = valid_frames(lengths, 12) & found.view(-1, 1)
    torch.testing.assert_close(loss[found].double(), expected[found], rtol=0, atol=1e-4)
    torch.testing.assert_close(grad[counts].double(), expected_grad[counts], rtol=0, atol=1e-4)


@runs_kernels
def test_strides():
    scores, labels, *rest = utterances(3, 8, 3, 5, 5)
    expected = ctc(scores.float(), labels, *rest, 0, backend="triton")
    turned = scores.float().transpose(0, 1).contiguous().transpose(0, 1)
    got = ctc(turned, labels.t().contiguous().t(), *rest, 0, backend="triton")
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@runs_kernels
def test_double_is_left_to_pytorch():
    scores, *batch = utterances(3, 8, 3, 5, 5)
    with pytest.raises(UserError, match=r"no kernel for torch\.float64"):
        ctc(scores, *batch, 0, backend="triton")
    loss, grad = ctc(scores, *batch, 0)
    assert loss.dtype == grad.dtype == torch.float64


def test_scores_of_low_precision():
    scores, *batch = utterances(3, 8, 3, 5, 5)
    with pytest.raises(ValueError, match="expected float32 or float64"):
        ctc(scores.bfloat16(), *batch, 0)


def test_shapes_that_do_not_fit():
    scores, labels, lengths, label_lengths = utterances(3, 8, 3, 5, 5)
    with pytest.raises(ValueError, match=r"found \(3, 8, 5\), \(2, 3\), \(3,\), \(3,\)"):
        ctc(scores, labels[:2], lengths, label_lengths, 0)


@installed
@outside
@pytest.mark.parametrize(("pairs", "warps"), [(32, 1), (128, 4), (512, 8)])
def test_nothing_is_spilled(pairs, warps):
    """Tokens of an utterance of 16 s, its characters, and those of a minute."""
    from modules.ops.ctc.triton_kernels import paths_kernel, posterior_kernel

    pointers = {"labels": "i64", "label_lengths": "i64"}
    constants = {"ENDS": 2, "PAIRS": pairs, "LABELS": 2 * pairs, "COLUMNS": 64}
    for kernel, of_kernel in ((paths_kernel, warps), (posterior_kernel, 1)):
        _, spilled, _ = compile_kernel(kernel, "fp32", constants, of_kernel, **pointers)
        assert spilled == 0


@installed
@outside
def test_one_warp_exchanges_by_shuffles():
    """What waits for memory or a barrier in every frame takes eight times longer."""
    from modules.ops.ctc.triton_kernels import paths_kernel

    pointers = {"labels": "i64", "label_lengths": "i64"}
    constants = {"ENDS": 1, "PAIRS": 32}
    _, _, ptx = compile_kernel(paths_kernel, "fp32", constants, 1, **pointers)
    assert ptx.count("shfl.sync") == 4  # in a loop of four frames
    assert ptx.count("bar.sync") == 1  # before the loss
    assert "st.shared" not in ptx


def float32_error(scores, labels, lengths, label_lengths):
    """How far PyTorch's gradients in float32 are off, at most."""
    batch = labels, lengths, label_lengths, 0
    (loss, expected), (_, grad) = (
        ctc(x, *batch, backend="torch") for x in (scores, scores.float())
    )
    counts = valid_frames(lengths, scores.shape[1]) & loss.isfinite().view(-1, 1)
    return (grad - expected)[counts].abs().max().item()


@pytest.mark.gpu
@gpu
@runs_kernels
@pytest.mark.parametrize(
    "size", [(96, 400, 240, 31, 31), (32, 400, 60, 61, 61), (2, 3000, 900, 31, 31)]
)
def test_speech_on_a_gpu(size):
    """As near as PyTorch's in float32, whose sums of 10,000 cost 0.01 of a posterior.

    And twice the same, to the bit: a thread that read what another had not written would tell.
    """
    scores, labels, lengths, label_lengths = utterances(*size)
    lengths.clamp_(min=2 * int(label_lengths.max()), max=size[1])
    tolerance = 2 * float32_error(scores, labels, lengths, label_lengths)
    compare(scores, labels, lengths, label_lengths, tolerance=tolerance)
    batch = scores.float(), labels, lengths, label_lengths, 0
    first = ctc(*batch, backend="triton")
    for _ in range(20):
        assert all(map(torch.equal, ctc(*batch, backend="triton"), first))


@pytest.mark.gpu
@gpu
@runs_kernels
def test_a_graph_holds_it():
    """As nothing waits for the device."""
    batch = [x.float() if x.is_floating_point() else x for x in utterances(8, 100, 20, 31, 31)]
    expected = ctc(*batch, 0, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ctc(*batch, 0, backend="triton")
    graph.replay()
    assert all(map(torch.equal, got, expected))
