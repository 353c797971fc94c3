"""Every backend of the selective scan equals the naive loop, results and gradients."""

import itertools
import logging
import sys
from types import ModuleType

import pytest
import torch

from modules.errors import UserError
from modules.ops import selective_scan as scan_package
from modules.ops.backends import Backends
from modules.ops.selective_scan import (
    available_backends,
    chunked,
    cuda,
    naive,
    selective_scan,
    triton,
)
from tests.ops.results import assert_same, results

LEAVES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
# (chunks, steps) of a block: this machine's own choice, the CPU's kind, the CUDA kind.
SHAPES = [None, (1, 16), (4, 4), (3, 1)]


def make(frames, batch=3, channels=5, states=4, dtype=torch.float64, leave_out=(), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {
        "u": leaf(batch, frames, channels),
        "dt": leaf(batch, frames, channels),
        "A": -leaf(channels, states).abs() - 0.1,
        "B": leaf(batch, frames, states),
        "C": leaf(batch, frames, states),
        "D": leaf(channels),
        "z": leaf(batch, frames, channels),
        "dt_bias": leaf(channels),
        "initial_state": leaf(batch, channels, states),
    }
    if dtype in (torch.bfloat16, torch.float16):  # as under autocast: parameters stay float32
        for name in ("A", "D", "dt_bias", "initial_state"):
            leaves[name] = leaves[name].float()
    return {k: v.requires_grad_() for k, v in leaves.items() if k not in leave_out}


def run(leaves, backend, **options):
    """-> result, state and the gradients of a fixed mix of both, by name"""
    options = {"dt_softplus": True, **options}
    return results(leaves, *selective_scan(**leaves, **options, return_state=True, backend=backend))


@pytest.fixture(params=SHAPES, ids=str)
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(chunked, "block_shape", lambda *call: request.param)


@pytest.fixture(params=["naive", *SHAPES], ids=str)
def backend(request, monkeypatch):
    if request.param == "naive":
        return "naive"
    if request.param:
        monkeypatch.setattr(chunked, "block_shape", lambda *call: request.param)
    return "chunked"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 33, 100])
def test_chunked_equals_naive(frames, reverse, block):
    lengths = torch.tensor([frames, 0, max(frames // 2, 1)])
    leaves = make(frames)
    for options in ({"reverse": reverse}, {"reverse": reverse, "lengths": lengths}):
        assert_same(run(leaves, "chunked", **options), run(leaves, "naive", **options))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize(
    "leave_out", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias")]
)
def test_optional_arguments(leave_out, softplus):
    leaves = make(33, leave_out=leave_out)
    if not softplus:
        leaves["dt"] = leaves["dt"].detach().abs().requires_grad_()
    options = {"dt_softplus": softplus, "lengths": torch.tensor([33, 1, 20])}
    assert_same(run(leaves, "chunked", **options), run(leaves, "naive", **options))


@pytest.mark.parametrize("states", [1, 3, 16, 64])
def test_number_of_states(states, block):
    leaves = make(35, states=states)
    assert_same(run(leaves, "chunked"), run(leaves, "naive"))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_float32_is_close_to_float64(backend):
    exact = run(make(100), "naive")
    single = run(make(100, dtype=torch.float32), backend)
    assert single["y"].dtype == single["state"].dtype == torch.float32
    assert_same({k: v.double() for k, v in single.items()}, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    lengths = torch.tensor([50, 1, 49])
    half = make(50, dtype=dtype)
    got = run(half, "chunked", lengths=lengths)
    assert got["y"].dtype == dtype and got["state"].dtype == torch.float32
    assert all(got[name].dtype == half[name].dtype for name in LEAVES)
    single = {k: v.detach().float().requires_grad_() for k, v in half.items()}
    expected = run(single, "naive", lengths=lengths)
    # Inside all is float32: the state agrees to its precision, the rest but for the last rounding.
    torch.testing.assert_close(got["state"], expected["state"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["y"], expected["y"].to(dtype), rtol=1e-2, atol=1e-3)


def test_autocast_changes_nothing():
    leaves = make(20, dtype=torch.float32)
    for backend in ("naive", "chunked"):
        expected = run(leaves, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(run(leaves, backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dt_scale", [1e3, 1e-6])
@pytest.mark.parametrize("A_scale", [1.0, 1e3])
def test_extreme_steps_and_decays(backend, dt_scale, A_scale):
    double = make(40, leave_out=("dt_bias",))
    with torch.no_grad():
        double["dt"].copy_(double["dt"].abs().clamp(0.1) * dt_scale)
        double["A"].mul_(A_scale)
    single = {k: v.detach().float().requires_grad_() for k, v in double.items()}
    exact = run(
        {k: v.detach().double().requires_grad_() for k, v in single.items()},
        "naive",
        dt_softplus=False,
    )
    got = run(single, backend, dt_softplus=False)
    for name, x in got.items():
        scale = exact[name].abs().max().clamp(min=1e-30)
        assert torch.isfinite(x).all(), name
        assert (x - exact[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_padding(backend, reverse, garbage):
    lengths = torch.tensor([21, 0, 5])
    clean = make(21)
    padding = torch.arange(21) >= lengths[:, None]
    dirty = {k: v.detach().clone() for k, v in clean.items()}
    for name in ("u", "dt", "z", "B", "C"):
        dirty[name][padding] = garbage
    dirty = {k: v.requires_grad_() for k, v in dirty.items()}
    options = {"lengths": lengths, "reverse": reverse}
    got = run(dirty, backend, **options)
    assert_same(got, run(clean, backend, **options), rtol=0, atol=0)
    for name in ("y", "u", "dt", "z", "B", "C"):
        assert (got[name][padding] == 0).all(), name
    assert torch.equal(got["state"][1], dirty["initial_state"][1])


@pytest.mark.parametrize("reverse", [False, True])
def test_padded_batch_equals_single_utterances(reverse):
    lengths = torch.tensor([30, 7, 1])
    leaves = {k: v.detach() for k, v in make(30, dtype=torch.float32).items()}
    options = {"dt_softplus": True, "reverse": reverse, "return_state": True}
    y, state = selective_scan(**leaves, **options, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        one = {k: v[b : b + 1] if v.shape[0] == 3 else v for k, v in leaves.items()}
        one = {
            k: v[:, :length] if v.dim() == 3 and k != "initial_state" else v for k, v in one.items()
        }
        y_one, state_one = selective_scan(**one, **options)
        torch.testing.assert_close(y[b : b + 1, :length], y_one)
        torch.testing.assert_close(state[b : b + 1], state_one)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cuts", [[0, 40], [0, 1, 2, 40], [0, 16, 32, 40], [0, 7, 7, 39, 40]])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_pieces_equal_whole(backend, cuts, reverse):
    leaves = make(40)
    whole = run(leaves, backend, reverse=reverse)
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    state, results = leaves["initial_state"], []
    for piece in reversed(pieces) if reverse else pieces:
        part = {k: v[:, piece] if k in ("u", "dt", "z", "B", "C") else v for k, v in leaves.items()}
        part["initial_state"] = state
        y, state = selective_scan(
            **part, dt_softplus=True, reverse=reverse, return_state=True, backend=backend
        )
        results.append(y)
    y = torch.cat(results[::-1] if reverse else results, dim=1)
    torch.testing.assert_close(y, whole["y"])
    torch.testing.assert_close(state, whole["state"])
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (y, state)
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert_same(dict(zip(leaves, gradients, strict=True)), {k: whole[k] for k in leaves})


def test_gradcheck(block):
    leaves = make(5, batch=2, channels=1, states=2)
    for reverse in (False, True):
        torch.autograd.gradcheck(
            lambda *x, reverse=reverse: selective_scan(
                **dict(zip(leaves, x, strict=True)),
                dt_softplus=True,
                reverse=reverse,
                lengths=torch.tensor([5, 4]),
                return_state=True,
                backend="chunked",
            ),
            tuple(leaves.values()),
        )


def test_gradient_from_the_state_alone():
    leaves = make(20)
    wanted = [leaves[k] for k in ("u", "dt", "A", "B", "dt_bias", "initial_state")]
    both = []
    for backend in ("naive", "chunked"):
        _, state = selective_scan(**leaves, dt_softplus=True, return_state=True, backend=backend)
        both.append(torch.autograd.grad(state.square().sum(), wanted))
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frames", [1, 37, 100, 400, 1500])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("state_size", [64, 2**16, 2**21])
def test_blocks_cover_every_frame_once(frames, device, state_size):
    covered, launches = [], 0
    shape = chunked.block_shape(device, state_size, frames)
    for first, chunks, steps in chunked.blocks(frames, *shape):
        covered += range(first, first + chunks * steps)
        launches += 2 * steps + chunks
    assert covered == list(range(frames))
    if device == "cuda" and state_size <= 2**16 and frames >= 100:
        assert launches < frames / 2


def test_shapes_are_checked():
    leaves = make(10)
    leaves["B"] = leaves["B"][:, :9]
    with pytest.raises(ValueError, match=r"B is \(3, 9, 4\); expected \(3, 10, 4\)"):
        selective_scan(**leaves)
    with pytest.raises(ValueError, match="expected integers"):
        selective_scan(**make(10), lengths=torch.ones(3))


def test_forced_backends(monkeypatch, caplog):
    monkeypatch.setattr(
        scan_package,
        "_backends",
        Backends(
            "selective_scan",
            "MAMBA_ASR_SCAN_BACKEND",
            {"mamba_ssm": cuda, "chunked": chunked, "naive": naive},
            reference="naive",
        ),
    )
    backends = scan_package._backends
    used = []
    for module in (chunked, naive):

        def spy(*arguments, module=module, function=module.selective_scan):
            used.append(module)
            return function(*arguments)

        monkeypatch.setattr(module, "selective_scan", spy)
    leaves = make(3)

    with caplog.at_level(logging.INFO, logger="modules.ops.backends"):
        selective_scan(**leaves)
        selective_scan(**leaves)
        backends.set_default("naive")
        selective_scan(**leaves)
        monkeypatch.setenv("MAMBA_ASR_SCAN_BACKEND", "chunked")
        selective_scan(**leaves)
        selective_scan(**leaves, backend="naive")
    assert used == [chunked, chunked, naive, chunked, naive]
    assert len(caplog.records) == 2  # once a backend
    assert not any("first calls" in record.getMessage() for record in caplog.records)

    monkeypatch.setenv("MAMBA_ASR_SCAN_BACKEND", "fast")
    with pytest.raises(UserError, match=r"'fast'.*MAMBA_ASR_SCAN_BACKEND.*auto, chunked, naive"):
        selective_scan(**leaves)
    with pytest.raises(UserError, match=r"'quick'.*set_backend"):
        backends.set_default("quick")


def test_a_slow_first_call_is_told(monkeypatch, caplog):
    monkeypatch.setattr(chunked, "FIRST_CALL", triton.FIRST_CALL, raising=False)
    monkeypatch.setattr(scan_package._backends, "logged", set())
    with caplog.at_level(logging.INFO, logger="modules.ops.backends"):
        selective_scan(**make(5))
    assert "chunked backend (chosen automatically); the first calls compile" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_missing_package_is_explained():
    assert available_backends()["chunked"] == "ok"
    assert "CUDA" in available_backends()["mamba_ssm"]
    with pytest.raises(UserError, match="not available: needs a CUDA device"):
        selective_scan(**make(3), backend="mamba_ssm")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_mamba_ssm_arguments(monkeypatch, reverse, softplus):
    """The wrapper, with the package's function replaced by one that has its layout."""

    def fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert u.shape[-1] == 128
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        y, state = naive.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, False, None, True
        )
        return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)

    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = fake
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    leaves = make(30, dtype=torch.float32, leave_out=("initial_state",))
    if not softplus:
        leaves["dt"] = leaves["dt"].detach().abs().requires_grad_()
        leaves["dt_bias"] = leaves["dt_bias"].detach().abs().requires_grad_()
    lengths = torch.tensor([30, 0, 11])
    arguments = (*leaves.values(), softplus, lengths, reverse, None, True)
    padding = torch.arange(30) >= lengths[:, None]
    with torch.no_grad():
        for name in ("u", "dt", "z", "B", "C"):
            leaves[name][padding] = float("nan")
    results = []
    for function in (cuda.selective_scan, naive.selective_scan):
        y, state = function(*arguments)
        results.append((y, state, *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mamba_ssm_tiles():
    assert [cuda.padded_frames(t) for t in (1, 128, 129, 400, 1024, 1025, 2049)] == [
        128, 128, 256, 512, 1024, 2048, 4096,
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("frames", [1, 33, 400])
@pytest.mark.parametrize("backend", ["mamba_ssm", "chunked"])
def test_cuda_equals_naive_in_double(backend, frames, reverse):
    if available_backends()[backend] != "ok":
        pytest.skip(available_backends()[backend])
    exact = make(frames, channels=32, states=16, leave_out=("initial_state",))
    lengths = torch.tensor([frames, 0, max(frames // 2, 1)])
    results = []
    for device, dtype, name in (("cpu", torch.float64, "naive"), ("cuda", torch.float32, backend)):
        leaves = {k: v.detach().to(device, dtype).requires_grad_() for k, v in exact.items()}
        y = selective_scan(
            **leaves, dt_softplus=True, lengths=lengths.to(device), reverse=reverse, backend=name
        )
        gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        results.append([x.cpu().double() for x in (y, *gradients)])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)
