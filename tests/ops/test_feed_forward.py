"""The feed-forward branch by Triton equals plain PyTorch in float64.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import copy

import pytest
import torch
from torch import nn

from modules.casting import with_weights_cast
from modules.compilation import compile_layers
from modules.encoder_layer import EncoderLayer
from modules.ops.feed_forward import pytorch, residual_feed_forward, triton
from tests.ops.interpreted import (
    DEVICE,
    compile_kernel,
    gpu,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="needs an H100 or H200"
)
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
# Of the branch's largest number. A GPU rounds, the interpreter cuts bfloat16 off.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 1e-3}


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 23


def make(channels, hidden, closes, dtype=torch.float32):
    """-> norm, first, second, closing, with weights of products that dtype holds"""
    torch.manual_seed(channels)
    norm, first = nn.LayerNorm(channels), nn.Linear(channels, hidden)
    second, closing = nn.Linear(hidden, channels), nn.LayerNorm(channels, eps=0.1)
    for parameter in (*norm.parameters(), *closing.parameters(), first.bias, second.bias):
        nn.init.normal_(parameter)
    for module in (first, second):
        module.to(dtype).float()
    modules = norm, first, second, closing if closes else None
    return [module and module.to(DEVICE) for module in modules]


def run(x, modules, dtype=torch.bfloat16):
    with torch.no_grad(), torch.autocast(DEVICE, dtype):
        return residual_feed_forward(x, *modules, scale=0.5)


def in_double(x, modules):
    modules = [module and copy.deepcopy(module).double() for module in modules]
    with torch.no_grad():
        return pytorch.residual_feed_forward(x.double(), *modules, scale=0.5)


def assert_equals_double(x, modules, dtype):
    """Relative to what the branch adds, or to the closing norm's numbers."""
    got, expected = run(x, modules, dtype), in_double(x, modules)
    added = expected if modules[3] else expected - x
    assert got.shape == x.shape and torch.isfinite(got).all()
    assert (got - expected).abs().max() <= TOLERANCE[dtype] * added.abs().max()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 48, 144, 256])
@pytest.mark.parametrize("closes", [False, True])
def test_equals_pytorch_in_double(channels, closes, dtype):
    modules = make(channels, 128, closes, dtype)
    assert_equals_double(torch.randn(3, 23, channels, device=DEVICE), modules, dtype)


@runs_kernels
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_large_and_tiny_numbers(scale):
    x = scale * torch.randn(2, 9, 48, device=DEVICE)
    x[0, 3] = 7.0  # no variance
    modules = make(48, 64, True, torch.float16)
    assert_equals_double(x, modules, torch.float16)
    nn.init.constant_(modules[1].bias, 20 * scale**0.1)  # GELU's ends
    assert_equals_double(x, modules, torch.float16)


@runs_kernels
def test_any_strides_and_dtypes():
    modules, x = make(48, 64, False), torch.randn(2, 9, 48, device=DEVICE)
    expected = run(x, modules)
    assert expected.dtype == torch.float32
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([x, x], dim=-1)[..., 48:]
    assert torch.equal(run(turned, modules), expected) and torch.equal(run(wide, modules), expected)
    assert run(x.bfloat16(), modules).dtype == torch.bfloat16
    assert run(x.bfloat16(), make(48, 64, True)).dtype == torch.float32
    assert run(x[:0], modules).shape == (0, 9, 48)


@runs_kernels
def test_frames_do_not_mix():
    """Not with what lies beside them in a batch, nor with a frame that is not a number."""
    modules, x = make(48, 64, True), torch.randn(3, 50, 48, device=DEVICE)
    y = run(x, modules)
    torch.testing.assert_close(run(x[1:2, :20], modules), y[1:2, :20], rtol=0, atol=1e-6)
    x[1, 7] = float("nan")
    z = run(x, modules)
    assert z[1, 7].isnan().all()
    y[1, 7] = z[1, 7] = 0
    assert torch.equal(y, z)


class Mixer(nn.Linear):
    """The least that a layer takes."""

    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, x, lengths, state):
        return super().forward(x), state


def make_layers(activation=nn.GELU):
    torch.manual_seed(0)
    network = nn.Module()
    options = {"kernel_size": 3, "activation": activation, "dropout": 0.0, "causal": False}
    network.layers = nn.ModuleList(EncoderLayer(16, 64, Mixer, **options) for _ in range(2))
    return network.to(DEVICE)


def pass_layers(network, x, dtype=torch.bfloat16):
    lengths = torch.full(x.shape[:1], x.shape[1], device=DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        for layer in network.layers:
            x, _ = layer(x, lengths)
    return x


@runs_kernels
def test_compiled_layers_run_it_in_inference_alone(monkeypatch):
    calls, sizes_of = [], triton.sizes_of
    monkeypatch.setattr(triton, "sizes_of", lambda *sizes: calls.append(sizes) or sizes_of(*sizes))
    network, x = make_layers().eval(), torch.randn(2, 9, 16, device=DEVICE)
    with torch.no_grad():
        expected = pass_layers(network, x)
    assert not calls
    torch._dynamo.reset()
    compile_layers(network, backend=BACKEND)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad():
        y = pass_layers(network, x)
        assert calls == 4 * [(18, 16)]
        cast = with_weights_cast(lambda x: pass_layers(network, x), network)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(cast(x), y, rtol=2e-2, atol=2e-2)
        assert len(calls) == 8
        assert pass_layers(network, x[:1, :5]).shape == (1, 5, 16) and len(calls) == 12
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    calls.clear()
    with torch.no_grad():
        pass_layers(network, x, None)  # in float32
    pass_layers(network, x).sum().backward()
    before = counters["stats"]["unique_graphs"]
    pass_layers(network.train(), x).sum().backward()
    pass_layers(network, torch.randn(3, 7, 16, device=DEVICE)).sum().backward()
    # A first layer's input has no gradient.
    assert counters["stats"]["unique_graphs"] <= before + 2
    assert not calls and not counters["graph_break"]


@runs_kernels
def test_another_activation_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(triton, "sizes_of", None)
    torch._dynamo.reset()
    network, x = make_layers(nn.SiLU).eval(), torch.randn(2, 9, 16, device=DEVICE)
    compile_layers(network, backend=BACKEND)
    with torch.no_grad():
        assert pass_layers(network, x).shape == x.shape


def test_fits_is_marked_as_pytorch_marks_it():
    """Set by hand, as asking PyTorch for it imports the compiler."""

    def other():
        pass

    assert vars(torch.compiler.assume_constant_result(other)) == vars(triton.fits)


def test_sizes():
    assert triton.parts_of(144) == ((128, 16), (0, 128))
    assert triton.parts_of(240) == ((128, 64, 32, 16), (0, 128, 192, 224))
    assert triton.fits(144, 1024, False) and triton.fits(256, 64, False)
    for channels, hidden in ((0, 64), (8, 64), (40, 64), (272, 64), (144, 96)):
        assert not triton.fits(channels, hidden, False)
    assert triton.sizes_of(12800, 144) == triton.sizes_of(400, 144) == (64, 64, 2)
    assert triton.sizes_of(12800, 192) == (128, 64, 3)
    assert triton.sizes_of(400, 192) == (64, 64, 3)
    assert triton.sizes_of(12800, 256) == (128, 32, 3)


@installed
@outside
@pytest.mark.parametrize("channels, spills", [(144, 16), (256, 1200)])
@pytest.mark.parametrize("frames", [400, 12800])
def test_an_h100_multiplies_all_by_its_tensor_cores(channels, spills, frames):
    """At the widest it spills before and behind the loop."""
    from modules.ops.feed_forward.triton_kernels import forward_kernel

    rows, block, stages = triton.sizes_of(frames, channels)
    widths, starts = triton.parts_of(channels)
    constants = {"D": channels, "HIDDEN": 1024, "WIDTHS": widths, "STARTS": starts, "ROWS": rows}
    constants |= {"BLOCK": block, "STAGES": stages, "CLOSES": True}
    constants |= {"eps": 1e-5, "out_eps": 1e-5, "scale": 0.5}
    halves = dict.fromkeys(("weight1", "bias1", "weight2", "bias2"), "bf16")
    _, spilled, ptx = compile_kernel(forward_kernel, "fp32", constants, rows // 16, **halves)
    assert spilled <= spills
    assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("closes", [False, True])
def test_at_the_small_models_size(dtype, closes):
    modules = make(144, 1024, closes, dtype)
    x = torch.randn(32, 400, 144, device="cuda")
    assert_equals_double(x, modules, dtype)
    y, again = run(x, modules, dtype), run(x, modules, dtype)
    assert torch.equal(y, again)
    assert torch.equal(run(x[5:6, :130], modules, dtype), y[5:6, :130])  # by smaller programs
