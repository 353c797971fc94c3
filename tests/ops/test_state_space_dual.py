"""Every backend of the state-space dual equals the naive loop, results and gradients."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modules.errors import UserError
from modules.ops.selective_scan import exporting
from modules.ops.state_space_dual import available_backends, chunked, scan, state_space_dual
from tests.ops.results import assert_same, results

torch.set_num_threads(1)  # for tensors this small, threads cost more than they save

BACKENDS = ["chunked", "scan"]


def make(frames, batch=3, heads=2, channels=3, states=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {
        "x": leaf(batch, frames, heads, channels),
        "dt": leaf(batch, frames, heads),
        "A": -leaf(heads).abs() - 0.1,
        "B": leaf(batch, frames, states),
        "C": leaf(batch, frames, states),
        "D": leaf(heads),
        "dt_bias": leaf(heads) - 2,
        "initial_state": leaf(batch, heads, channels, states),
    }
    if dtype == torch.bfloat16:  # as under autocast: parameters stay float32
        for name in ("A", "D", "dt_bias", "initial_state"):
            leaves[name] = leaves[name].float()
    return {k: v.requires_grad_() for k, v in leaves.items()}


def run(leaves, backend, **options):
    """-> result, state and the gradients of a fixed mix of both, by name"""
    return results(leaves, *state_space_dual(**leaves, **options, backend=backend))


@pytest.fixture(params=[(4, 3), (16, 64), None], ids=str)
def cut(request, monkeypatch):
    """Frames of a chunk and chunks of a group: few, so that all edges are met; as shipped."""
    if request.param:
        size, group = request.param
        monkeypatch.setattr(chunked, "chunk_frames", lambda device: size)
        monkeypatch.setattr(chunked, "GROUP", group)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 16, 33, 100])
def test_chunked_equals_naive(frames, reverse, cut):
    leaves, lengths = make(frames), torch.tensor([frames, 0, max(frames // 2, 1)])
    for options in ({"reverse": reverse}, {"reverse": reverse, "lengths": lengths}):
        assert_same(run(leaves, "chunked", **options), run(leaves, "naive", **options))


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_the_selective_scan_of_equal_decays(reverse):
    leaves, options = make(37), {"reverse": reverse, "lengths": torch.tensor([37, 0, 11])}
    assert_same(run(leaves, "scan", **options), run(leaves, "naive", **options))


def test_the_quadratic_form_of_the_paper():
    """One utterance written out as attention, eq. 7: y = (L * C B') (dt x) + D x."""
    leaves = {k: v.detach() for k, v in make(9, batch=1, heads=1).items()}
    leaves["initial_state"].zero_()
    x, dt, B, C = (leaves[k][0] for k in ("x", "dt", "B", "C"))
    dt = F.softplus(dt[:, 0] + leaves["dt_bias"])
    L = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(9):
        for j in range(i + 1):
            L[i, j] = torch.exp((dt[j + 1 : i + 1] * leaves["A"]).sum())
    expected = (L * (C @ B.t())) @ (dt[:, None] * x[:, 0]) + leaves["D"] * x[:, 0]
    for backend in ("naive", *BACKENDS):
        y, _ = state_space_dual(**leaves, backend=backend)
        torch.testing.assert_close(y[0, :, 0], expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("first", [0, 1, 32, 45])
def test_pieces_equal_whole(first, reverse):
    leaves = make(45)
    whole = run(leaves, "chunked", reverse=reverse)
    state, results = leaves["initial_state"], []
    pieces = [slice(0, first), slice(first, 45)]
    for piece in reversed(pieces) if reverse else pieces:
        part = {k: v[:, piece] if k in ("x", "dt", "B", "C") else v for k, v in leaves.items()}
        y, state = state_space_dual(**part | {"initial_state": state}, reverse=reverse)
        results.append(y)
    y = torch.cat(results[::-1] if reverse else results, dim=1)
    torch.testing.assert_close(y, whole["y"])
    torch.testing.assert_close(state, whole["state"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dt_scale", [1e3, 1e-6])
@pytest.mark.parametrize("A_scale", [1.0, 1e3])
def test_extreme_steps_and_decays(backend, dt_scale, A_scale):
    """A large step beside small ones, where differences of sums would have lost the small."""
    single = make(40, dtype=torch.float32)
    with torch.no_grad():
        single["dt"].fill_(1e-3)
        single["dt"][:, ::7] = dt_scale
        single["dt_bias"].fill_(-6.0)
        single["A"].mul_(A_scale)
    double = {k: v.detach().double().requires_grad_() for k, v in single.items()}
    exact, got = run(double, "naive"), run(single, backend)
    for name, t in got.items():
        scale = exact[name].abs().max().clamp(min=1e-30)
        assert torch.isfinite(t).all(), name
        assert (t - exact[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_padding(backend, reverse, garbage):
    lengths, clean = torch.tensor([21, 0, 5]), make(21)
    padding = torch.arange(21) >= lengths[:, None]
    dirty = {k: v.detach().clone() for k, v in clean.items()}
    for name in ("x", "dt", "B", "C"):
        dirty[name][padding] = garbage
    dirty = {k: v.requires_grad_() for k, v in dirty.items()}
    options = {"lengths": lengths, "reverse": reverse}
    got = run(dirty, backend, **options)
    assert_same(got, run(clean, backend, **options), rtol=0, atol=0)
    for name in ("y", "x", "dt", "B", "C"):
        assert (got[name][padding] == 0).all(), name
    assert torch.equal(got["state"][1], dirty["initial_state"][1])


def test_bfloat16_in_and_out():
    half, options = make(50, dtype=torch.bfloat16), {"lengths": torch.tensor([50, 1, 49])}
    single = {k: v.detach().float().requires_grad_() for k, v in half.items()}
    expected, got = run(single, "naive", **options), run(half, "chunked", **options)
    assert got["y"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    for name, t in got.items():
        assert (t.float() - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_autocast_changes_nothing():
    leaves = make(20, dtype=torch.float32)
    for backend in ("naive", *BACKENDS):
        expected = run(leaves, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = state_space_dual(**leaves, backend=backend)
        assert torch.equal(y, expected["y"]) and torch.equal(state, expected["state"])


def test_gradcheck(cut):
    leaves = make(6, batch=1, heads=1, channels=1, states=2)
    for reverse in (False, True):
        torch.autograd.gradcheck(
            lambda *t, reverse=reverse: state_space_dual(
                **dict(zip(leaves, t, strict=True)),
                reverse=reverse,
                lengths=torch.tensor([5]),
                backend="chunked",
            ),
            tuple(leaves.values()),
            fast_mode=True,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("frames", [1, 65, 400])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_equals_naive_in_double(backend, frames, reverse, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    exact = make(frames, heads=4, channels=32, states=64)
    lengths, results = torch.tensor([frames, 0, max(frames // 2, 1)]), []
    for device, dtype, name in (("cpu", torch.float64, "naive"), ("cuda", torch.float32, backend)):
        leaves = {k: v.detach().to(device, dtype).requires_grad_() for k, v in exact.items()}
        y, state = state_space_dual(
            **leaves, lengths=lengths.to(device), reverse=reverse, backend=name
        )
        loss = y.square().sum() + state.square().sum()
        results.append([y, state, *torch.autograd.grad(loss, list(leaves.values()))])
    for expected, got in zip(*results, strict=True):
        scale = expected.abs().max().clamp(min=1)
        assert (got.cpu().double() - expected).abs().max() <= 1e-4 * scale


def test_the_environment_and_an_exported_graph_choose(monkeypatch):
    leaves, used = make(3), []
    for module in (chunked, scan):

        def spy(*arguments, module=module, function=module.state_space_dual):
            used.append(module)
            return function(*arguments)

        monkeypatch.setattr(module, "state_space_dual", spy)
    state_space_dual(**leaves)
    monkeypatch.setenv("MAMBA_ASR_DUAL_BACKEND", "scan")
    state_space_dual(**leaves)
    with exporting("doubling"), torch.no_grad():
        state_space_dual(**leaves, backend="chunked")
    assert used == [chunked, scan, scan]
    assert set(available_backends().values()) == {"ok"}
    with pytest.raises(UserError, match=r"'quick'.*backend argument.*auto, chunked, scan, naive"):
        state_space_dual(**leaves, backend="quick")


def test_shapes_are_checked():
    leaves = make(10)
    with pytest.raises(ValueError, match=r"B is \(3, 9, 4\); expected \(3, 10, 4\)"):
        state_space_dual(**leaves | {"B": leaves["B"][:, :9]})
    with pytest.raises(ValueError, match=r"expected \(B, T, H, P\)"):
        state_space_dual(**leaves | {"x": leaves["x"][0]})
    with pytest.raises(ValueError, match="expected integers"):
        state_space_dual(**leaves, lengths=torch.ones(3))
