"""The Triton backend of the selective scan equals the naive loop in float64.

On a CUDA device the kernels run there. Elsewhere they run in Triton's interpreter, in a process of
its own, as TRITON_INTERPRET must be set before triton is imported.
"""

import pytest
import torch
from test_selective_scan import make, run
from torch.utils.checkpoint import checkpoint

from modules.ops.selective_scan import bidirectional_scan, selective_scan, triton
from modules.ops.selective_scan.triton_extent import EXTENTS
from tests.ops.interpreted import (
    DEVICE,
    gpu,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)

PER_FRAME = ("u", "dt", "z", "B", "C")


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 20


def leaves_of(dtype, *shape, leave_out=()):
    """-> as `make`, on the device, dtype in the inputs of every frame and float32 elsewhere"""
    frames, channels, states = shape
    leaves = make(frames, 3, channels, states, dtype, leave_out)
    return {k: v.detach().to(DEVICE).requires_grad_() for k, v in leaves.items()}


def assert_close(leaves, tolerance, **options):
    """Result, state and gradients equal naive's in float64, relative to the largest number."""
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    expected = run(exact, "naive", **options)
    got = run(leaves, "triton", **options)
    for name, x in got.items():
        assert x.dtype == (leaves[name].dtype if name in leaves else x.dtype), name
        assert torch.isfinite(x).all(), name
        scale = expected[name].abs().max().clamp(min=1e-30)
        # Sums over frames of many signs: their rounding goes with their terms.
        assert (x - expected[name]).abs().max() <= tolerance * max(scale, 1e-3), name
    assert got["y"].dtype == leaves["u"].dtype and got["state"].dtype == torch.float32
    return got


def lengths_of(frames):
    return torch.tensor([frames, 0, max(frames // 2, 1)], device=DEVICE)


TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES = [  # frames, channels, states, reverse, lengths, softplus, what is left out
    (1, 1, 4, False, False, True, ()),
    (1, 32, 16, True, True, False, ("z", "dt_bias")),
    (2, 31, 5, True, False, False, ("D",)),
    (3, 70, 16, False, True, True, ("z", "initial_state")),
    (7, 40, 4, True, True, True, ("dt_bias",)),
    (8, 32, 16, False, False, True, ("D", "z")),
    (5, 33, 8, True, True, True, ("D",)),
    (9, 31, 1, False, True, True, ("initial_state",)),
    (17, 31, 5, True, True, True, ("D", "z", "dt_bias", "initial_state")),
    (33, 20, 16, False, True, False, ()),
    (6, 32, 64, True, True, True, ("z",)),
]


# As CASES, also for the extent of programs that so small a scan would not choose.
EXTENT_CASES = [
    (1, 1, 4, False, False, True, ()),
    (3, 40, 16, True, True, True, ("z", "initial_state")),
    (6, 33, 64, True, True, True, ("z",)),
    (9, 79, 16, False, True, True, ("D",)),
    (17, 41, 8, True, False, False, ("dt_bias",)),
    (38, 33, 16, False, True, True, ()),
]


@pytest.fixture(params=EXTENTS, ids=lambda extent: f"{extent.channels} channels")
def extent(request, monkeypatch):
    """Programs have so many channels, whatever the shape."""
    monkeypatch.setattr(triton, "extent_of", lambda *shape: request.param)
    return request.param


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_naive_in_double(case):
    assert_case(case)


@runs_kernels
@pytest.mark.parametrize("extent", EXTENTS[1:], indirect=True, ids=lambda x: x.channels)
@pytest.mark.parametrize("case", EXTENT_CASES, ids=str)
def test_other_extents_equal_naive_in_double(case, extent):
    assert_case(case)


def assert_case(case):
    frames, channels, states, reverse, with_lengths, softplus, leave_out = case
    leaves = leaves_of(torch.float32, frames, channels, states, leave_out=leave_out)
    if not softplus:
        with torch.no_grad():
            leaves["dt"].abs_()
            if "dt_bias" in leaves:
                leaves["dt_bias"].abs_()
    options = {"reverse": reverse, "dt_softplus": softplus}
    if with_lengths:
        options["lengths"] = lengths_of(frames)
    assert_close(leaves, TOLERANCE[torch.float32], **options)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("states", [16, 6, 2])  # of bfloat16 in pairs: four, two or one a thread
def test_half_precision(dtype, states, extent):
    leaves = leaves_of(dtype, 5, 20, states)
    assert_close(leaves, TOLERANCE[dtype], lengths=lengths_of(5), reverse=True)
    leaves["dt"] = leaves["dt"].detach().float().requires_grad_()  # each has a dtype of its own
    assert_close(leaves, TOLERANCE[dtype])


@runs_kernels
@pytest.mark.parametrize("reverse, garbage", [(False, float("inf")), (True, float("nan"))])
def test_views_of_projections_with_garbage_in_the_padding(
    reverse, garbage, extent, fresh_memory_is_nan
):
    frames, channels, states = 6, 33, 4
    lengths = lengths_of(frames)
    padding = torch.arange(frames, device=DEVICE) >= lengths[:, None]
    clean = leaves_of(torch.float32, frames, channels, states)
    options = {"lengths": lengths, "reverse": reverse}
    expected = run(clean, "triton", **options)

    dirty = {k: v.detach().clone() for k, v in clean.items()}
    for name in PER_FRAME:
        dirty[name][padding] = garbage
    # u in time-major order; u, z and dt, B, C as halves and parts of what a projection gives.
    dirty["u"], dirty["z"] = torch.cat([dirty["u"], dirty["z"]], -1).chunk(2, -1)
    dirty["dt"], dirty["B"], dirty["C"] = torch.cat(
        [dirty[name] for name in ("dt", "B", "C")], -1
    ).split([channels, states, states], -1)
    dirty["u"] = dirty["u"].transpose(0, 1).contiguous().transpose(0, 1)
    dirty = {k: v.requires_grad_() for k, v in dirty.items()}
    assert not dirty["z"].is_contiguous() and not dirty["u"].is_contiguous()
    got = run(dirty, "triton", **options)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    for name in ("y", *PER_FRAME):
        assert (got[name][padding] == 0).all(), name
    assert torch.equal(got["state"][1], clean["initial_state"][1])


@runs_kernels
def test_packed_rows_that_lie_apart():
    frames, channels, states = 6, 33, 4
    leaves = leaves_of(torch.bfloat16, frames, channels, states)
    expected = run(leaves, "triton")
    apart = {k: v.detach().clone() for k, v in leaves.items()}
    _, apart["B"], apart["C"] = torch.cat(
        [apart["dt"][..., :32], apart["B"], apart["C"]], -1
    ).split([32, states, states], -1)
    got = run({k: v.requires_grad_() for k, v in apart.items()}, "triton")
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@runs_kernels
@pytest.mark.parametrize("reverse, leave_out", [(True, ()), (False, ("z", "initial_state"))])
def test_time_in_pieces(reverse, leave_out, monkeypatch):
    """Pieces of 32 frames: a full one, one cut by the length, one without any valid frame."""
    monkeypatch.setattr(triton, "LEAST", 16)
    frames = 70
    assert triton._pieces(1, 3, frames, 20) == (3, 32)
    leaves = leaves_of(torch.float32, frames, 20, 4, leave_out=leave_out)
    assert_close(leaves, 1e-5, lengths=lengths_of(frames), reverse=reverse)


@runs_kernels
def test_both_directions_at_once_equal_two_scans(extent):
    """Also with one gradient for both, as the gate around them gives it."""
    frames, channels, states = 38, 33, 16
    shapes = {"u": (2, 2, frames, channels), "dt": (2, 2, frames, channels)}
    shapes |= {"A": (2, channels, states), "B": (2, 2, frames, states), "C": (2, 2, frames, states)}
    shapes |= {"D": (2, channels), "dt_bias": (2, channels)}
    generator = torch.Generator().manual_seed(0)
    leaves = {k: torch.randn(v, generator=generator).to(DEVICE) for k, v in shapes.items()}
    leaves["A"] = -leaves["A"].abs()
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    dy = torch.randn(2, frames, channels, generator=generator).to(DEVICE)
    lengths = torch.tensor([frames, 7], device=DEVICE)
    results = []
    for backend in ("triton", "naive"):
        y = bidirectional_scan(**leaves, dt_softplus=True, lengths=lengths, backend=backend)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.expand(2, -1, -1, -1))
        results.append((y, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )


@runs_kernels
def test_channels_first_inputs():
    leaves = leaves_of(torch.float32, 5, 8, 4)
    turned = {
        k: v.detach().transpose(1, 2).contiguous().transpose(1, 2) if k in PER_FRAME else v.detach()
        for k, v in leaves.items()
    }
    turned = {k: v.requires_grad_() for k, v in turned.items()}
    expected, got = (run(x, "triton") for x in (leaves, turned))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@runs_kernels
@pytest.mark.parametrize("dt_scale", [1e3, 1e-6])
@pytest.mark.parametrize("A_scale", [1.0, 1e3])
def test_extreme_steps_and_decays(dt_scale, A_scale):
    leaves = leaves_of(torch.float32, 9, 8, 4, leave_out=("dt_bias",))
    with torch.no_grad():
        leaves["dt"].abs_().clamp_(0.1).mul_(dt_scale)
        leaves["A"].mul_(A_scale)
    assert_close(leaves, 1e-4, dt_softplus=False)


@runs_kernels
def test_softplus_far_from_zero():
    leaves = leaves_of(torch.float32, 12, 3, 4, leave_out=("dt_bias",))
    values = torch.tensor([-200, -90, -30, -17, -8, -1e-3, 1e-3, 3, 19, 21, 90, 1e3])
    with torch.no_grad():
        leaves["dt"].copy_(values[:, None].expand_as(leaves["dt"]))
    got = assert_close(leaves, 1e-5)
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    expected = run(exact, "naive")["dt"]
    finite = (values > -60) & (values < 30)  # float32 holds them, far below the largest too
    torch.testing.assert_close(
        got["dt"][:, finite].double(), expected[:, finite], rtol=1e-3, atol=1e-12
    )


@runs_kernels
def test_gradient_from_the_state_or_the_result_alone(extent):
    leaves = leaves_of(torch.float32, 6, 8, 4)
    for part in (0, 1):
        both = []
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "naive")):
            inputs = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items()}
            parts = selective_scan(**inputs, dt_softplus=True, return_state=True, backend=backend)
            both.append(
                torch.autograd.grad(
                    parts[part].square().sum(), list(inputs.values()), materialize_grads=True
                )
            )
        for got, expected in zip(*both, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@runs_kernels
def test_no_gradient_no_saved_states():
    leaves = leaves_of(torch.float32, 6, 8, 4)
    expected = selective_scan(**leaves, dt_softplus=True, backend="triton")
    with torch.no_grad():
        got = selective_scan(**leaves, dt_softplus=True, backend="triton")
    assert torch.equal(got, expected) and not got.requires_grad
    empty = {k: v[:0] if v.dim() == 3 else v for k, v in leaves.items()}
    assert selective_scan(**empty, backend="triton").shape == (0, 6, 8)


@runs_kernels
def test_autocast_checkpoint_and_repetition_change_nothing():
    leaves = leaves_of(torch.float32, 2, 33, 4)
    expected = run(leaves, "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        autocast = run(leaves, "triton")
    for name in expected:
        assert torch.equal(autocast[name], expected[name]), name

    def scan(*tensors):
        inputs = dict(zip(leaves, tensors, strict=True))
        return selective_scan(**inputs, dt_softplus=True, backend="triton").square().sum()

    for use_reentrant in (False, True):
        loss = checkpoint(scan, *leaves.values(), use_reentrant=use_reentrant)
        plain = torch.autograd.grad(scan(*leaves.values()), list(leaves.values()))
        for x in leaves.values():
            x.grad = None
        loss.backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(leaves.values(), plain, strict=True))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_real_sizes(dtype, reverse):
    for leave_out in ((), ("z", "initial_state")):
        leaves = leaves_of(dtype, 403, 288, 16, leave_out=leave_out)
        tolerance = {**TOLERANCE, torch.float32: 1e-4}[dtype]
        assert_close(leaves, tolerance, lengths=lengths_of(403), reverse=reverse)


@pytest.mark.gpu
@gpu
def test_a_training_step_like_chunked():
    generator = torch.Generator(DEVICE).manual_seed(0)

    def leaf(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype).requires_grad_()

    leaves = {
        "u": leaf(32, 400, 1024),
        "dt": leaf(32, 400, 1024),
        "A": (-torch.arange(1.0, 17, device=DEVICE).repeat(1024, 1)).requires_grad_(),
        "B": leaf(32, 400, 16),
        "C": leaf(32, 400, 16),
        "D": leaf(1024, dtype=torch.float32),
        "dt_bias": (leaf(1024, dtype=torch.float32).detach() - 4).requires_grad_(),
    }
    lengths = torch.randint(200, 401, (32,), generator=generator, device=DEVICE)
    first, again, expected = (
        run(leaves, backend, lengths=lengths) for backend in ("triton", "triton", "chunked")
    )
    for name in expected:
        assert torch.equal(first[name], again[name]), name
        error = (first[name].float() - expected[name].float()).abs().max()
        assert error <= 1e-2 * expected[name].float().abs().max(), name
