"""Compiled GELU is PyTorch's, within float32's rounding."""

import pytest
import torch
from torch import nn

from modules.activation import GELU, ShortGELU, build_activation
from modules.encoder_layer import FeedForward

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def with_slope(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def errors(x):
    """The largest of the value, relative beyond 1, and of the slope."""
    y, slope = with_slope(ShortGELU.apply, x)
    assert y.dtype == slope.dtype == x.dtype
    theirs, their_slope = with_slope(nn.functional.gelu, x.double())
    y_error = (y.double() - theirs).abs() / theirs.abs().clamp(min=1)
    return y_error.max().item(), (slope.double() - their_slope).abs().max().item()


def test_short_gelu_is_exact_to_float32():
    y_error, slope_error = errors(torch.linspace(-12, 12, 2_000_001))
    assert y_error < 2.5e-7
    assert slope_error < 2e-7


def test_short_gelu_is_exact_to_bfloat16():
    """All numbers of bfloat16 up to 16, rounded at the end alone."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    y_error, slope_error = errors(x[x.abs() < 16])
    assert y_error <= 2**-8 + 2.5e-7
    assert slope_error <= 2**-8 + 2e-7


def test_infinite_and_missing_numbers_are_pytorchs():
    """Those of its CUDA kernels; its CPU's have NaN for the infinite one, and inf for 3e38."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0, 14, 1e4, 1e38, inf, nan, -14, -1e4, -1e38, -inf, -nan])
    y, slope = with_slope(ShortGELU.apply, x)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    theirs = torch.tensor([0, 14, 1e4, 1e38, inf, nan, 0, 0, 0, nan, nan])
    torch.testing.assert_close(y, theirs, **exact)
    theirs = torch.tensor([0.5, 1, 1, 1, nan, nan, 0, 0, 0, nan, nan])
    torch.testing.assert_close(slope, theirs, **exact)


def test_torch_compile_takes_it_whole():
    compiled = torch.compile(ShortGELU.apply, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (5, 9):
        x = torch.randn(2, size, dtype=torch.bfloat16)
        for ours, theirs in zip(
            with_slope(compiled, x), with_slope(ShortGELU.apply, x), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_only_pytorchs_own_gelu_is_replaced():
    assert type(build_activation(nn.GELU)) is GELU
    assert type(build_activation(nn.SiLU)) is nn.SiLU
    assert type(build_activation(lambda: nn.GELU(approximate="tanh"))) is nn.GELU
    x = torch.randn(100)
    assert torch.equal(GELU()(x), nn.GELU()(x))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_feed_forward_learns_what_eager_does(dtype):
    torch.manual_seed(0)
    layer = FeedForward(32, 64, nn.GELU, dropout=0.0).cuda()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    exact = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for shape in ((4, 50, 32), (3, 33, 32)):
        x = torch.randn(shape, device="cuda")
        found = []
        for run in (compiled, layer):
            z = x.clone().requires_grad_()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                y = run(z)
            inputs = (z, *layer.parameters())
            found.append((y, *torch.autograd.grad(y.float().square().mean(), inputs)))
        for ours, theirs in zip(*found, strict=True):
            scale = theirs.abs().max()
            torch.testing.assert_close(ours / scale, theirs / scale, **exact)
