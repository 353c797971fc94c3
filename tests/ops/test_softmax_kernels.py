"""CTC's softmax by Triton equals PyTorch's in float64.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch

from modules.ops import ctc
from tests.ops.interpreted import (
    DEVICE,
    assert_near,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 29


def random_logits(B, T, V, dtype=torch.float32):
    generator = torch.Generator().manual_seed(V)
    logits = (5 * torch.randn(B, T, V, generator=generator)).to(dtype)
    factors = torch.randn(B, T, generator=generator)
    factors[0, 0] = 0.0
    return logits.to(DEVICE), factors.to(DEVICE)


def random_columns(B, T, V, count):
    """Columns (B, count), of which the last comes twice where there are more, and their values."""
    generator = torch.Generator().manual_seed(V)
    columns = torch.stack([torch.randperm(V, generator=generator)[:count] for _ in range(B)])
    values = torch.randn(B, T, count, generator=generator)
    if count > 1:
        columns[:, 0], values[..., 0] = columns[:, -1], values[..., -1]
    return columns.to(DEVICE), values.to(DEVICE)


def no_columns(logits):
    B, T, _ = logits.shape
    return torch.empty(B, 0, dtype=torch.long, device=DEVICE), torch.empty(B, T, 0, device=DEVICE)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [3, 64, 4096, 5000])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_pytorch_in_double(V, dtype, backend):
    logits, factors = random_logits(2, 3, V, dtype)
    columns, values = random_columns(2, 3, V, min(V, 41))
    sums = ctc.normalizers(logits, backend=backend)
    got = ctc.scaled_softmax(logits, sums, factors, columns, values, backend=backend)
    assert (sums.dtype, got.dtype) == (torch.float32, dtype)
    expected = logits.double().logsumexp(2)
    probabilities = logits.double().softmax(2)
    for b in range(2):
        probabilities[b, :, columns[b]] = values[b].double()
    probabilities *= factors.unsqueeze(2)
    eps = torch.finfo(dtype).eps
    assert_near([sums.double(), got.double()], [expected, probabilities], max(eps, 1e-6))
    assert not got[0, 0].any()


@runs_kernels
def test_large_and_infinite_logits():
    logits, factors = random_logits(1, 4, 5000)
    logits[0, 1] += 1e4
    logits[0, 2, ::2] = float("-inf")
    logits[0, 3, 7] = 1e4
    sums = ctc.normalizers(logits, backend="triton")
    torch.testing.assert_close(sums.double(), logits.double().logsumexp(2), rtol=1e-6, atol=0)
    got = ctc.scaled_softmax(logits, sums, factors, *no_columns(logits), backend="triton")
    expected = logits.double().softmax(2) * factors.unsqueeze(2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-7)


@runs_kernels
@pytest.mark.parametrize("V", [70, 5000])
@pytest.mark.parametrize("value", [float("-inf"), float("inf")])
def test_sums_of_infinities(V, value):
    logits, _ = random_logits(1, 2, V)
    logits[0, 0], logits[0, 1, 5] = value, value
    sums = ctc.normalizers(logits, backend="triton")
    torch.testing.assert_close(sums.double(), logits.double().logsumexp(2), rtol=1e-6, atol=0)


@runs_kernels
@pytest.mark.parametrize("top", [-1e4, 1e4, 1e30])
def test_sums_of_large_logits_are_exact_to_rounding(top):
    logits, _ = random_logits(2, 8, 5000)
    sums = ctc.normalizers(logits + top, backend="triton")
    expected = (logits + top).double().logsumexp(2)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(sums.double(), expected, rtol=eps, atol=0)


@runs_kernels
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_unless_the_factor_is_zero(backend):
    logits, factors = random_logits(1, 3, 70)
    logits[0, 0, 5], logits[0, 1] = float("nan"), float("nan")
    sums = ctc.normalizers(logits, backend=backend)
    assert sums.isnan().tolist() == [[True, True, False]]
    got = ctc.scaled_softmax(logits, sums, factors, *no_columns(logits), backend=backend)
    assert not got[0, 0].any() and got[0, 1].isnan().all() and got[0, 2].isfinite().all()


@runs_kernels
def test_no_rows():
    logits, factors = torch.zeros(0, 3, 5, device=DEVICE), torch.zeros(0, 3, device=DEVICE)
    sums = ctc.normalizers(logits, backend="triton")
    assert sums.shape == (0, 3)
    assert ctc.scaled_softmax(
        logits, sums, factors, *no_columns(logits), backend="triton"
    ).shape == (0, 3, 5)
