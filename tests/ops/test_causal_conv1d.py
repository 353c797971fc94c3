"""Every backend of the causal convolution equals the naive loop, results and gradients."""

import itertools
import sys
from types import ModuleType

import pytest
import torch

from modules.errors import UserError
from modules.ops.causal_conv1d import available_backends, causal_conv1d, cuda, naive


def make(frames, kernel=4, batch=3, channels=8, dtype=torch.float64, leave_out=()):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, frames, channels),
        "weight": (channels, kernel),
        "bias": (channels,),
        "initial_state": (batch, channels, kernel - 1),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
        if name not in leave_out
    }


def gradients(y, state, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (y, state)
    )
    return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


def run(leaves, backend, **options):
    """-> result, state and the gradients of a fixed mix of both"""
    y, state = causal_conv1d(**leaves, **options, return_state=True, backend=backend)
    return [y, state, *gradients(y, state, leaves)]


def assert_same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kernel", [2, 3, 4, 31])
@pytest.mark.parametrize("frames", [1, 2, 17, 33])
def test_torch_equals_naive(frames, kernel, reverse):
    leaves = make(frames, kernel)
    for lengths in (None, torch.tensor([frames, 0, 1])):
        for activation in (None, "silu"):
            options = {"lengths": lengths, "reverse": reverse, "activation": activation}
            assert_same(run(leaves, "torch", **options), run(leaves, "naive", **options))


@pytest.mark.parametrize("leave_out", [("bias",), ("initial_state",), ("bias", "initial_state")])
@pytest.mark.parametrize("reverse", [False, True])
def test_optional_arguments(leave_out, reverse):
    for kernel in (4, 31):
        leaves = make(12, kernel, leave_out=leave_out)
        options = {"lengths": torch.tensor([12, 1, 7]), "reverse": reverse}
        assert_same(run(leaves, "torch", **options), run(leaves, "naive", **options))


def test_kernel_of_one():
    leaves = make(5, kernel=1)
    y, state = causal_conv1d(**leaves, return_state=True)
    torch.testing.assert_close(y, leaves["x"] * leaves["weight"][:, 0] + leaves["bias"])
    assert state.shape == (3, 8, 0)


def test_definition():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    weight = torch.tensor([[10.0, 1.0]])
    for backend in ("naive", "torch"):
        y, state = causal_conv1d(x, weight, return_state=True, backend=backend)
        assert y.flatten().tolist() == [1, 12, 23, 34] and state.tolist() == [[[4]]]
        y, state = causal_conv1d(x, weight, reverse=True, return_state=True, backend=backend)
        assert y.flatten().tolist() == [21, 32, 43, 4] and state.tolist() == [[[1]]]


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("kernel", [4, 31])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_padding(backend, kernel, reverse, garbage):
    lengths = torch.tensor([20, 0, 5])
    clean = make(20, kernel)
    dirty = {k: v.detach().clone() for k, v in clean.items()}
    padding = torch.arange(20) >= lengths[:, None]
    dirty["x"][padding] = garbage
    dirty = {k: v.requires_grad_() for k, v in dirty.items()}
    options = {"lengths": lengths, "reverse": reverse, "activation": "silu"}
    got = run(dirty, backend, **options)
    assert_same(got, run(clean, backend, **options), rtol=0, atol=0)
    assert (got[0][padding] == 0).all() and (got[2][padding] == 0).all()
    assert torch.equal(got[1][1], dirty["initial_state"][1])


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("kernel", [4, 31])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 40], [0, 16, 40], [0, 7, 7, 39, 40]])
def test_pieces_equal_whole(backend, kernel, reverse, cuts):
    leaves = make(40, kernel)
    whole = run(leaves, backend, reverse=reverse)
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    state, results = leaves["initial_state"], []
    for piece in reversed(pieces) if reverse else pieces:
        part = {**leaves, "x": leaves["x"][:, piece], "initial_state": state}
        y, state = causal_conv1d(**part, reverse=reverse, return_state=True, backend=backend)
        results.append(y)
    y = torch.cat(results[::-1] if reverse else results, dim=1)
    assert_same([y, state, *gradients(y, state, leaves)], whole)


@pytest.mark.parametrize("kernel", [4, 31])
def test_half_precision_and_autocast(kernel):
    leaves = make(30, kernel, dtype=torch.float32)
    expected = run(leaves, "naive", activation="silu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(leaves, "torch", activation="silu"), expected, rtol=1e-4, atol=1e-4)
    leaves["x"] = leaves["x"].detach().bfloat16().requires_grad_()
    got = run(leaves, "torch", activation="silu")
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    assert_same([x.float() for x in got], [x.float() for x in expected], rtol=5e-2, atol=2e-1)


def test_gradcheck():
    for reverse in (False, True):
        leaves = make(5, channels=2, batch=2)
        torch.autograd.gradcheck(
            lambda x, weight, bias, state, reverse=reverse: causal_conv1d(
                x, weight, bias, activation="silu", lengths=torch.tensor([5, 2]), reverse=reverse,
                initial_state=state, return_state=True, backend="torch",
            ),
            tuple(leaves.values()),
        )  # fmt: skip


def test_arguments_are_checked():
    leaves = make(5)
    with pytest.raises(ValueError, match=r"bias is \(7,\); expected \(8,\)"):
        causal_conv1d(leaves["x"], leaves["weight"], torch.zeros(7))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d(leaves["x"], leaves["weight"], activation="relu")


def test_forced_backend(monkeypatch):
    leaves = make(5)
    monkeypatch.setenv("MAMBA_ASR_CONV_BACKEND", "fast")
    with pytest.raises(UserError, match=r"'fast'.*MAMBA_ASR_CONV_BACKEND.*torch, naive"):
        causal_conv1d(**leaves)
    causal_conv1d(**leaves, backend="naive")  # the argument comes first


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels", [8, 5])
def test_causal_conv1d_arguments(monkeypatch, reverse, channels):
    """The wrapper, with the package's function replaced by one that has its layout."""

    def fake(x, weight, bias, activation):
        assert x.stride(1) == 1 or x.is_contiguous()
        x = x.transpose(1, 2)
        return naive.causal_conv1d(x, weight, bias, activation, None, False, None, False)[
            0
        ].transpose(1, 2)

    module = ModuleType("causal_conv1d")
    module.causal_conv1d_fn = fake
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    leaves = make(9, channels=channels, leave_out=("initial_state",))
    lengths = torch.tensor([9, 0, 4])
    with torch.no_grad():
        leaves["x"][torch.arange(9) >= lengths[:, None]] = float("nan")
    results = []
    for function in (cuda.causal_conv1d, naive.causal_conv1d):
        y, _ = function(*leaves.values(), "silu", lengths, reverse, None, False)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    assert_same(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ["causal_conv1d", "torch"])
def test_cuda_equals_naive_in_double(backend, reverse):
    if available_backends()[backend] != "ok":
        pytest.skip(available_backends()[backend])
    exact = make(50, leave_out=("initial_state",))
    lengths = torch.tensor([50, 0, 20])
    results = []
    for device, dtype, name in (("cpu", torch.float64, "naive"), ("cuda", torch.float32, backend)):
        leaves = {k: v.detach().to(device, dtype).requires_grad_() for k, v in exact.items()}
        options = {"lengths": lengths.to(device), "reverse": reverse, "activation": "silu"}
        y = causal_conv1d(**leaves, **options, backend=name)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
        results[-1] = [x.cpu().double() for x in results[-1]]
    assert_same(*results, rtol=1e-4, atol=1e-4)
