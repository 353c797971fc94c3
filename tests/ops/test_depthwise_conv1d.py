"""The depthwise convolution by Triton equals PyTorch's own in float64, results and gradients.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch
from torch import nn

from modules.lengths import zero_padding
from modules.ops.backends import Call
from modules.ops.depthwise_conv1d import depthwise_conv1d, triton
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
    assert run_in_the_interpreter(__file__) >= 16


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Several programs an utterance at few frames, but at real size on a GPU."""
    if "gpu" not in request.keywords:
        for name in ("FRAMES", "BACKWARD_FRAMES"):
            monkeypatch.setattr(triton, name, 8)


def make(frames, kernel, channels=5, batch=3, dtype=torch.float32):
    """-> x (B, T, D) in dtype, weight (D, K) and bias (D,) in float32"""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, frames, channels), (channels, kernel), (channels,)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        .to(DEVICE, torch.float32 if i else dtype)
        .requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def lengths_of(frames):
    return torch.tensor([frames, 0, 1], device=DEVICE)


def run(leaves, lengths, backend, wrt=None):
    """leaves: x, weight and perhaps bias -> result and the gradients of a fixed mix of it"""
    bias = leaves[2] if len(leaves) > 2 else None
    y = depthwise_conv1d(*leaves[:2], bias, lengths, backend=backend)
    mix = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad((y * mix.to(y)).sum(), wrt or leaves)]


def in_double(leaves, lengths):
    return run([x.detach().double().requires_grad_() for x in leaves], lengths, "torch")


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_definition():
    x, weight, bias = (leaf.detach().double().cpu() for leaf in make(6, 3, batch=2))
    lengths = torch.tensor([6, 4])
    x[1, 4:] = float("nan")
    y = depthwise_conv1d(x, weight, bias, lengths, backend="torch")
    x[1, 4:] = 0
    around = nn.functional.pad(x, (0, 0, 1, 1))
    expected = bias + sum(weight[:, k] * around[:, k : k + 6] for k in range(3))
    torch.testing.assert_close(y, expected)


@runs_kernels
@pytest.mark.parametrize(
    "frames, kernel, channels",
    [(1, 3, 1), (1, 31, 2), (13, 31, 5), (8, 31, 4), (21, 3, 5), (9, 5, 70), (4, 1, 64)],
)
def test_equals_torch_in_double(frames, kernel, channels):
    leaves, lengths = make(frames, kernel, channels), lengths_of(frames)
    assert_near(run(leaves, lengths, "triton"), in_double(leaves, lengths), 2e-6)


@runs_kernels
def test_widest_kernel_without_a_bias():
    leaves, lengths = make(11, triton.WIDEST, batch=1)[:2], torch.tensor([10], device=DEVICE)
    assert_near(run(leaves, lengths, "triton"), in_double(leaves, lengths), 2e-6)


@runs_kernels
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype, tolerance):
    leaves, lengths = make(9, 3, dtype=dtype), lengths_of(9).int()
    with torch.no_grad():  # to numbers that rounding leaves alone
        for leaf in leaves[1:]:
            leaf.copy_(leaf.to(dtype))
    got = run(leaves, lengths, "triton")
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(got, in_double(leaves, lengths), tolerance)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=runs_kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_is_pytorchs_own(dtype, backend):
    x, weight, bias = make(9, 3, dtype=dtype)
    lengths = lengths_of(9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run((x, weight, bias), lengths, backend)
        y = nn.functional.conv1d(
            zero_padding(x, lengths).transpose(1, 2), weight[:, None], bias, padding=1, groups=5
        )
    assert got[0].dtype == y.dtype == torch.bfloat16
    assert [g.dtype for g in got[1:]] == [dtype, torch.float32, torch.float32]
    assert_near(got[:1], [y.transpose(1, 2)], 8e-3)


@runs_kernels
def test_strided_rows_with_nan_in_the_padding():
    leaves, lengths = make(13, 5), lengths_of(13)
    expected = run(leaves, lengths, "triton")
    padding = torch.arange(13, device=DEVICE) >= lengths[:, None]
    assert (expected[1][padding] == 0).all()

    dirty = leaves[0].detach().masked_fill(padding[..., None], float("nan"))
    wide = torch.cat([torch.full_like(dirty, float("nan")), dirty], -1).requires_grad_()
    half = [wide.chunk(2, -1)[1], *leaves[1:]]
    y, dwide, *parameters = run(half, lengths, "triton", wrt=[wide, *leaves[1:]])
    assert same([y, dwide[..., 5:], *parameters], expected)

    x = leaves[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert same(run([x, *leaves[1:]], lengths, "triton"), expected)
    y = depthwise_conv1d(*leaves, lengths, backend="triton")  # a gradient that is expanded
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert same(expanded, torch.autograd.grad(y, leaves, torch.ones_like(y)))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=runs_kernels)])
def test_empty(backend):
    for frames, batch in ((0, 2), (3, 0)):
        leaves = make(frames, 3, batch=batch)
        lengths = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        y = depthwise_conv1d(*leaves, lengths, backend=backend)
        assert y.shape == (batch, frames, 5)
        y.sum().backward()


def test_arguments_are_checked():
    x, weight, bias = make(7, 3)
    lengths = lengths_of(7)
    for arguments, message in (
        ((x[0], weight, bias, lengths), r"x is \(7, 5\)"),
        ((x, weight[:4], bias, lengths), r"weight \(4, 3\)"),
        ((x, weight[:, :2], bias, lengths), "odd K"),
        ((x, weight, bias[:4], lengths), r"bias is \(4,\)"),
        ((x, weight, bias, lengths[:2]), r"lengths is \(2,\)"),
        ((x, weight, bias, lengths / 7), "expected integers"),
    ):
        with pytest.raises(ValueError, match=message):
            depthwise_conv1d(*arguments)
    call = {"width": 31, "needs_grad": True, "initial_state": False, "return_state": False}
    assert triton.supports(Call("cuda", torch.bfloat16, **call)) == "ok"
    assert "float64" in triton.supports(Call("cuda", torch.float64, **call))
    assert "not 65" in triton.supports(Call("cuda", torch.float32, **{**call, "width": 65}))
    if not INTERPRETED:
        assert "cpu" in triton.supports(Call("cpu", torch.float32, **call))


def test_never_chosen_on_a_cpu(monkeypatch):
    monkeypatch.setattr(triton, "depthwise_conv1d", None)
    x, weight, bias = (leaf.cpu() for leaf in make(7, 3))
    assert depthwise_conv1d(x, weight, bias, lengths_of(7).cpu()).shape == x.shape


@installed
@pytest.mark.skipif(INTERPRETED, reason="the interpreter hides the compiler")
def test_compiles_for_an_h200():
    from modules.ops.depthwise_conv1d import triton_kernels

    warps = triton.CHANNELS // 32
    constants = {"WIDTH": 31, "CHANNELS": triton.CHANNELS}
    for kernel, chunk, most in (
        (triton_kernels.forward_kernel, triton.CHUNK, 128),  # 8 programs a multiprocessor
        (triton_kernels.backward_kernel, triton.BACKWARD_CHUNK, 168),  # 6
    ):
        constants["CHUNK"] = chunk
        registers, spilled, _ = compile_kernel(kernel, "bf16", constants, warps)
        assert spilled == 0 and registers <= most


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_at_real_size(dtype, tolerance):
    leaves = make(400, 31, 512, 32, dtype)
    with torch.no_grad():
        for leaf in leaves[1:]:
            leaf.copy_(leaf.to(dtype))
    generator = torch.Generator(DEVICE).manual_seed(0)
    lengths = torch.randint(200, 401, (32,), generator=generator, device=DEVICE)
    got, again = (run(leaves, lengths, "triton") for _ in range(2))
    assert same(got, again)
    assert_near(got, in_double(leaves, lengths), tolerance)
