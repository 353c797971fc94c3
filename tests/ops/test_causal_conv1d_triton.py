"""The Triton backend of the causal convolution equals the naive loop in float64.

On a CUDA device the kernels run there, elsewhere in Triton's interpreter, in a process of its own,
as TRITON_INTERPRET must be set before triton is imported; and the real compiler builds them for an
H200, which needs no device.
"""

import re

import pytest
import torch

from modules.ops.backends import Call
from modules.ops.causal_conv1d import bidirectional_conv1d, causal_conv1d, triton
from tests.ops.interpreted import (
    DEVICE,
    INTERPRETED,
    assert_near,
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
    assert run_in_the_interpreter(__file__) >= 18


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs an utterance at few frames."""
    for name in ("FRAMES", "BACKWARD_FRAMES"):
        monkeypatch.setattr(triton, name, 8)


def make(frames, kernel=4, batch=3, channels=8, dtype=torch.float32):
    """-> x in dtype, weights (2, D, K) and biases (2, D) in float32"""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, frames, channels),
        "weights": (2, channels, kernel),
        "biases": (2, channels),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype if name == "x" else torch.float32)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def lengths_of(frames):
    return torch.tensor([frames, 0, max(frames // 2, 1)], device=DEVICE)


def run(leaves, backend, direction=None, wrt=None, **options):
    """Both directions, or one, without a bias if there is none -> result and gradients."""
    if direction is None:
        y = bidirectional_conv1d(**leaves, **{"lengths": None, **options}, backend=backend)
    else:
        bias = leaves["biases"][direction] if "biases" in leaves else None
        options["reverse"] = direction == 1
        y = causal_conv1d(
            leaves["x"], leaves["weights"][direction], bias, **options, backend=backend
        )
    mix = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad((y * mix.to(y)).sum(), wrt or list(leaves.values()))]


def in_double(leaves, backend="naive", **options):
    leaves = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    return run(leaves, backend, **options)


@runs_kernels
@pytest.mark.parametrize("direction", [None, 0, 1])
@pytest.mark.parametrize("frames, kernel, channels", [(1, 4, 8), (21, 4, 3), (9, 8, 130)])
def test_equals_naive_in_double(small_tiles, frames, kernel, channels, direction):
    leaves = make(frames, kernel, channels=channels)
    options = {"direction": direction, "activation": "silu", "lengths": lengths_of(frames)}
    assert_near(run(leaves, "triton", **options), in_double(leaves, **options), 2e-6)


@runs_kernels
@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
def test_other_sizes_without_bias_activation_or_lengths(small_tiles, kernel):
    leaves = make(11, kernel, batch=2)
    options = {"activation": None}
    assert_near(run(leaves, "triton", **options), in_double(leaves, **options), 2e-6)
    del leaves["biases"]
    options = {"direction": kernel % 2}
    assert_near(run(leaves, "triton", **options), in_double(leaves, **options), 2e-6)


@runs_kernels
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_and_autocast(small_tiles, dtype, tolerance):
    leaves = make(9, 2, dtype=dtype)
    options = {"lengths": lengths_of(9).int()}
    got = run(leaves, "triton", **options)
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(got, in_double(leaves, **options), tolerance)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        again = run(leaves, "triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items()}
    got = run(leaves, "triton", **options)
    assert all(x.dtype == dtype for x in got)
    assert_near(got, in_double(leaves, **options), tolerance)


@runs_kernels
def test_half_of_a_projection_with_nan_in_the_padding(small_tiles):
    leaves = make(13)
    lengths = lengths_of(13)
    padding = torch.arange(13, device=DEVICE) >= lengths[:, None]
    expected = run(leaves, "triton", lengths=lengths)
    assert (expected[0][:, padding] == 0).all() and (expected[1][padding] == 0).all()

    dirty = leaves["x"].detach().masked_fill(padding[..., None], float("nan"))
    wide = torch.cat([torch.full_like(dirty, float("nan")), dirty], -1).requires_grad_()
    half = {**leaves, "x": wide.chunk(2, -1)[1]}
    y, dwide, *parameters = run(
        half, "triton", wrt=[wide, leaves["weights"], leaves["biases"]], lengths=lengths
    )
    got = [y, dwide[..., 8:], *parameters]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@runs_kernels
def test_any_strides():
    leaves = make(5, 2, batch=2)
    expected = run(leaves, "triton")
    for order in ((1, 0, 2), (0, 2, 1)):  # time before batch; channels before time
        x = leaves["x"].detach().permute(order).contiguous().permute(order).requires_grad_()
        got = run({**leaves, "x": x}, "triton")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    # Gradients that are expanded: over directions, and over everything.
    y = bidirectional_conv1d(**leaves, lengths=None, backend="triton")
    for of_one in (y.sum(0).square().sum(), y.sum()):
        grads = torch.autograd.grad(of_one, list(leaves.values()), retain_graph=True)
        assert all(torch.isfinite(x).all() for x in grads)
    dense = torch.autograd.grad(y, leaves["x"], torch.ones_like(y))
    assert torch.equal(grads[0], dense[0])


@runs_kernels
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_two_readers_gradients_are_added(small_tiles, backend, compiled):
    """In float32, though each is bfloat16; by Triton as it reads them."""
    leaves = make(21, channels=130, dtype=torch.bfloat16)
    given = {**leaves, "lengths": lengths_of(21), "backend": backend}
    mix = torch.randn(2, 2, 3, 21, 130, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def both():
        return bidirectional_conv1d(**given, twice=True)

    if compiled:
        torch._dynamo.reset()
        both = torch.compile(both, backend="aot_eager", dynamic=True)
    first, second = both()
    assert torch.equal(first, second)
    loss = (first.float() * mix[0]).sum() + (second.float() * mix[1]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    double = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    y = bidirectional_conv1d(**double, lengths=lengths_of(21), backend="naive")
    expected = torch.autograd.grad((y * mix.double().sum(0)).sum(), list(double.values()))
    assert_near([x.double() for x in found], expected, 8e-3)


@runs_kernels
def test_empty():
    for frames, batch in ((0, 2), (3, 0)):
        leaves = make(frames, batch=batch)
        for direction in (None, 1):
            y = run(leaves, "triton", direction, wrt=[leaves["x"]])[0] if frames else None
            assert frames == 0 or y.shape[-3:] == (batch, frames, 8)
        assert bidirectional_conv1d(**leaves, lengths=None).shape == (2, batch, frames, 8)


def test_portable_default_is_both_directions():
    leaves = {k: v.detach().double().cpu().requires_grad_() for k, v in make(7).items()}
    lengths = torch.tensor([7, 0, 3])
    both = run(leaves, "auto", lengths=lengths)
    options = {"lengths": lengths, "activation": "silu"}
    for direction in (0, 1):
        y = run(leaves, "naive", direction, **options)[0]
        torch.testing.assert_close(both[0][direction], y)
    with pytest.raises(ValueError, match=r"weights are \(1, 8, 4\)"):
        bidirectional_conv1d(leaves["x"], leaves["weights"][:1], leaves["biases"], None)


def test_what_it_refuses():
    call = {"width": 4, "needs_grad": True, "initial_state": False, "return_state": False}
    assert triton.supports(Call("cuda", torch.bfloat16, **call)) == "ok"
    assert "float64" in triton.supports(Call("cuda", torch.float64, **call))
    for change in ({"width": 9}, {"initial_state": True}, {"return_state": True}):
        assert triton.supports(Call("cuda", torch.float32, **{**call, **change})) != "ok"
    if not INTERPRETED:
        assert "cpu" in triton.supports(Call("cpu", torch.float32, **call))


@installed
@pytest.mark.skipif(INTERPRETED, reason="the interpreter hides the compiler")
@pytest.mark.parametrize(
    "directions, absent",
    [((True, True), ()), ((True, True), ("more",)), ((False, True), ("bias", "more"))],
)
def test_compiles_for_an_h200(directions, absent):
    from modules.ops.causal_conv1d import triton_kernels

    constants = dict(zip(("FORWARD", "REVERSE"), directions, strict=True))
    constants |= {"WIDTH": 4, "SILU": True, **dict.fromkeys(absent)}
    chunk = triton.CHUNK if "more" in absent else triton.CHUNK_OF_TWO
    constants |= {"CHANNELS": triton.CHANNELS, "CHUNK": chunk}
    for kernel, most in (
        (triton_kernels.forward_kernel, 64),
        (triton_kernels.backward_kernel, 128),  # eight programs of two warps a multiprocessor
    ):
        registers, spilled, ptx = compile_kernel(
            kernel, "bf16", constants, triton.CHANNELS // 64, more="bf16"
        )
        assert spilled == 0 and registers <= most
        assert not re.search(r"ld\.global\.b16", ptx), "two channels a thread, in one load"


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("direction", [None, 0, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_at_real_size(direction, dtype, tolerance):
    leaves = make(403, batch=32, channels=2048, dtype=dtype)
    half = leaves["x"].detach().chunk(2, -1)[0]
    leaves["weights"], leaves["biases"] = (
        leaves[k].detach()[:, :1024].requires_grad_() for k in ("weights", "biases")
    )
    leaves["x"] = half.requires_grad_()
    generator = torch.Generator(DEVICE).manual_seed(0)
    lengths = torch.randint(200, 404, (32,), generator=generator, device=DEVICE)
    options = {"direction": direction, "activation": "silu", "lengths": lengths}
    got, again = (run(leaves, "triton", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert_near(got, in_double(leaves, backend="torch", **options), tolerance)
