"""A step of Mamba equals its convolution and scan over one frame; Triton's equals PyTorch's.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch

from modules.ops.backends import Call
from modules.ops.causal_conv1d import causal_conv1d
from modules.ops.mamba_step import available_backends, conv_step, scan_step, triton
from modules.ops.selective_scan import selective_scan
from tests.ops.interpreted import (
    DEVICE,
    INTERPRETED,
    compile_kernel,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)

SHAPES = [(3, 70, 16, 4), (1, 64, 5, 1), (5, 130, 1, 3), (2, 8, 64, 2)]  # B, D, N, K


def make_inputs(shape, dtype, gate=True):
    """Per frame in dtype, parameters and ssm state in float32 (float64 with float64)."""
    batch, channels, states, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.promote_types(dtype, torch.float32)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    conv = {
        # A slice of a wider row, as in_proj gives it.
        "x": random(batch, 2 * channels)[:, :channels],
        "weight": random(channels, width, dtype=wide),
        "bias": random(channels, dtype=wide),
        "state": random(batch, channels, width - 1),
    }
    BC = random(batch, 3 + 2 * states)
    scan = {
        "x": random(batch, channels),
        "dt": 2 * random(batch, channels),
        "A_log": random(channels, states, dtype=wide),
        "B": BC[:, 3 : 3 + states],
        "C": BC[:, 3 + states :],
        "D": random(channels, dtype=wide),
        "z": random(batch, 2 * channels)[:, channels:] if gate else None,
        "dt_bias": random(channels, dtype=wide),
        "h": random(batch, channels, states, dtype=wide),
    }
    return conv, scan


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_one_frame_of_the_convolution_and_the_scan(shape, gate):
    conv, scan = make_inputs(shape, torch.float64, gate)
    found = conv_step(**conv, backend="torch")
    expected = causal_conv1d(
        conv["x"].unsqueeze(1),
        conv["weight"],
        conv["bias"],
        activation="silu",
        initial_state=conv["state"],
        return_state=True,
        backend="naive",
    )
    torch.testing.assert_close(found, (expected[0][:, 0], expected[1]))
    found = scan_step(**scan, backend="torch")
    frames = {k: None if v is None else v.unsqueeze(1) for k, v in scan.items()}
    expected = selective_scan(
        *(frames[name] for name in ("x", "dt")),
        -scan["A_log"].exp(),
        *(frames[name] for name in ("B", "C")),
        scan["D"],
        frames["z"],
        scan["dt_bias"],
        dt_softplus=True,
        initial_state=scan["h"],
        return_state=True,
        backend="naive",
    )
    torch.testing.assert_close(found, (expected[0][:, 0], expected[1]))


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__, "-k", "triton") >= 16


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_torch(shape, gate, dtype):
    conv, scan = make_inputs(shape, dtype, gate)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    for step, inputs in ((conv_step, conv), (scan_step, scan)):
        found, expected = (step(**inputs, backend=name) for name in ("triton", "torch"))
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        torch.testing.assert_close(found[0], expected[0], **tolerance)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@runs_kernels
def test_triton_takes_states_of_another_type():
    """The first step of a search in bfloat16 finds zeros in float32."""
    conv, _ = make_inputs((3, 70, 16, 4), torch.bfloat16)
    conv["state"] = conv["state"].float()
    found, expected = (conv_step(**conv, backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_triton_leaves_gradients_and_float64_to_torch():
    assert "float64" in triton.supports(Call("cuda", torch.float64, 16, False, True, True))
    assert "backward" in triton.supports(Call("cuda", torch.float32, 16, True, True, True))
    assert triton.supports(Call("cuda", torch.float32, 16, False, True, True)) == "ok"
    assert set(available_backends()) == {"torch", "triton"}


@installed
@pytest.mark.skipif(INTERPRETED, reason="there is no compiler then")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["conv_kernel", "scan_kernel"])
def test_triton_compiles_for_an_h200(name, dtype):
    """Which needs no device."""
    from modules.ops.mamba_step import triton_kernels

    kernel = getattr(triton_kernels, name)
    constants = {"WIDTH": 4, "N": 16, "CHANNELS": triton.CHANNELS}
    pointers = dict.fromkeys(("B", "C", "state", "new_state"), dtype)
    assert compile_kernel(kernel, dtype, constants, 4, **pointers)[1] == 0
