"""Compiled dropout: elements are dropped as often as they should be, and independently."""

import pytest
import torch

from modules.dropout import Dropout, keep, scramble

SIZE = 2**20


def drawn(p, seed=0):
    """`SIZE` draws, each 0 on average with a variance of 1."""
    torch.manual_seed(seed)
    return (keep(torch.empty(SIZE), p).double() - (1 - p)) / (p * (1 - p)) ** 0.5


def sigmas(products):
    """How far off 0 the mean of independent numbers is, of which each has a variance of 1."""
    return abs(products.mean().item()) * len(products) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_right_share_is_dropped(p):
    assert sigmas(drawn(p)) < 4.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 144, 2048])
def test_neighbours_are_independent(lag):
    x = drawn(0.1)
    assert sigmas(x[lag:] * x[:-lag]) < 4.5


def test_calls_are_independent_and_repeat_with_the_generator():
    first = drawn(0.1)
    assert torch.equal(first, drawn(0.1))
    assert sigmas(first * drawn(0.1, seed=1)) < 4.5


def test_bytes_of_neighbours_are_equally_frequent():
    """Pearson's test over the 256 patterns of eight; its mean is 255, its deviation 22.6."""
    patterns = (drawn(0.5) > 0).view(-1, 8).long() @ 2 ** torch.arange(8)
    counts, expected = torch.bincount(patterns, minlength=256), SIZE / 8 / 256
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 255) < 4.5 * 22.6


def ends(x):
    return x ^ (x >> 16 & 0xFFFF)


def test_scramble_is_the_published_function():
    """By Python's own numbers, which do not overflow."""

    def lowbias32(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 2**16, 2**31 - 1, 2**31, 0xDEADBEEF, 2**32 - 1]
    signed = [x - 2**32 * (x >= 2**31) for x in numbers]
    found = ends(scramble(ends(torch.tensor(signed, dtype=torch.int32))))
    assert [x % 2**32 for x in found.tolist()] == [lowbias32(x) for x in numbers]


def test_ends_between_two_scrambles_only_change_the_second_number():
    generator = torch.Generator().manual_seed(0)
    x, second = torch.randint(-(2**31), 2**31, (2, 1000), generator=generator).int()
    assert torch.equal(ends(ends(x) ^ second), x ^ ends(second))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dropout_drops_the_gradient_of_what_it_drops(dtype):
    layer = torch.compile(torch.nn.Sequential(torch.nn.GELU(), Dropout(0.1)), dynamic=True)
    for shape in ((32, 400, 256), (7, 33, 256)):
        x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
        torch.manual_seed(0)
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        whole = torch.nn.functional.gelu(x) / 0.9
        kept = y != 0
        assert (kept.double().mean() - 0.9).abs() < 0.01
        torch.testing.assert_close(y, whole * kept, rtol=1e-2, atol=1e-2)
        (theirs,) = torch.autograd.grad((whole * kept).sum(), x)
        told = whole != 0  # a kept zero looks dropped
        torch.testing.assert_close(gradient[told], theirs[told], rtol=2e-2, atol=2e-2)
        torch.manual_seed(0)
        assert torch.equal(layer(x), y)
        assert not torch.equal(layer(x), y)
    torch.testing.assert_close(layer.eval()(x), torch.nn.functional.gelu(x))
