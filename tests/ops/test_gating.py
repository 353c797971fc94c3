"""The gated mean by Triton equals plain PyTorch in float64, results and gradients.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch

from modules.ops.backends import Call
from modules.ops.gating import gated_mean, triton
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
    assert run_in_the_interpreter(__file__) >= 8


def make(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
        for s in ((2, *shape), shape)
    ]


def run(y, z, backend, leaves=None):
    """-> result and the gradients of a fixed mix of it"""
    out = gated_mean(y, z, backend=backend)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * mix.to(out)).sum(), leaves or (y, z))]


def in_double(y, z):
    return run(*(x.detach().double().requires_grad_() for x in (y, z)), "torch")


def test_definition():
    y, z = make(2, 3, 4, dtype=torch.float64)
    expected = (y[0] + y[1]) / 2 * z / (1 + torch.exp(-z))
    torch.testing.assert_close(gated_mean(y, z, backend="torch"), expected)


@runs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 70), (2, 2, 1030)], ids=str)
def test_equals_torch_in_double(shape):
    y, z = make(*shape)
    assert_near(run(y, z, "triton"), in_double(y, z), 1e-6)


@runs_kernels
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype, tolerance):
    y, z = make(2, 3, 40, dtype=dtype)
    got = run(y, z, "triton")
    assert all(x.dtype == dtype for x in got)
    assert_near(got, in_double(y, z), tolerance)
    z = z.detach().float().requires_grad_()  # each has a dtype of its own
    got = run(y, z, "triton")
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32]
    assert_near(got, in_double(y, z), tolerance)


@runs_kernels
def test_strided_rows_and_one_gradient_for_both_directions():
    y, z = make(2, 3, 20)
    expected = run(y, z, "triton")
    assert expected[1].stride(0) == 0
    wide = torch.cat([torch.zeros_like(z), z], -1).detach().requires_grad_()
    turned = y.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_()
    half = wide.chunk(2, -1)[1]
    out, dy, dwide = run(turned, half, "triton", (turned, wide))
    assert torch.equal(out, expected[0]) and torch.equal(dy, expected[1])
    assert torch.equal(dwide[..., 20:], expected[2]) and (dwide[..., :20] == 0).all()
    # A gradient whose rows are not dense, as a sum's.
    gated_mean(y, z, backend="triton").sum().backward()
    assert torch.isfinite(z.grad).all()


@runs_kernels
def test_extreme_gates():
    y, z = make(1, 1, 6)
    with torch.no_grad():
        z.copy_(torch.tensor([-1e4, -100.0, -20.0, 0.0, 90.0, 1e4]))
    assert_near(run(y, z, "triton"), in_double(y, z), 1e-6)


@runs_kernels
def test_empty():
    for shape in ((0, 3, 4), (2, 0, 4)):
        y, z = make(*shape)
        assert run(y, z, "triton")[0].shape == shape


def test_arguments_are_checked():
    y, z = make(2, 3, 4)
    with pytest.raises(ValueError, match=r"y is \(3, 4\)"):
        gated_mean(y[0, 0], z)
    call = {"width": 1, "needs_grad": True, "initial_state": False, "return_state": False}
    assert triton.supports(Call("cuda", torch.bfloat16, **call)) == "ok"
    assert "float64" in triton.supports(Call("cuda", torch.float64, **call))
    if not INTERPRETED:
        assert "cpu" in triton.supports(Call("cpu", torch.float32, **call))


def test_never_chosen_on_a_cpu(monkeypatch):
    monkeypatch.setattr(triton, "gated_mean", None)
    y, z = (x.cpu() for x in make(2, 3, 4))
    assert gated_mean(y, z).shape == z.shape


@installed
@pytest.mark.skipif(INTERPRETED, reason="the interpreter hides the compiler")
def test_compiles_for_an_h200():
    from modules.ops.gating import triton_kernels

    for kernel in (triton_kernels.forward_kernel, triton_kernels.backward_kernel):
        registers, spilled, ptx = compile_kernel(kernel, "bf16", {"CHANNELS": 1024}, 4)
        assert spilled == 0 and registers <= 64
        assert "ld.global.v4.b32" in ptx  # 16 bytes a thread


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_at_real_size(dtype, tolerance):
    y, z = make(32, 400, 1024, dtype=dtype)
    got, again = (run(y, z, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert_near(got, in_double(y, z), tolerance)
