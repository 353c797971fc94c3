"""No operator on an Apple GPU's path lacks a kernel there; checked without one.

A forward and backward pass runs on the CPU while every aten operator it dispatches is looked up
in the dispatch table that PyTorch was built from. What an Apple GPU would choose otherwise is
chosen here too: the scan's layout for GPUs, and attention without the CPU's fused kernel.
"""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from speechbrain.processing.features import InputNormalization
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.attention import RelPosAttention, RoPEAttention
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.features import Features
from modules.frontend import ConvFrontend
from modules.losses import ctc_loss, sequence_loss
from modules.mamba import BiMamba, Mamba
from modules.mamba2 import BiMamba2, Mamba2
from modules.ops.selective_scan import chunked
from modules.optimizers import clip, gradients_of, parameter_groups

torch.set_num_threads(1)  # for tensors this small, threads cost more than they save

# These ask for the tensor's device by hand, which the table does not show.
CHOSEN_BY_DEVICE = {
    "aten::convolution": "aten::_mps_convolution",
    "aten::convolution_backward": "aten::mps_convolution_backward",
}


@cache
def dispatch_table():
    """Operator -> (the keys it has kernels for, the operator that it is derived from)."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    table = {}
    for entry in yaml.load(path.read_text(), loader):
        keys = {key.strip() for group in entry.get("dispatch", {}) for key in str(group).split(",")}
        name = "aten::" + entry["func"].split("(")[0]
        delegate = entry.get("structured_delegate")
        table[name] = keys, delegate and f"aten::{delegate}"
    return table


def keys_of(name):
    keys, delegate = dispatch_table()[name]
    return keys | (keys_of(delegate) if delegate else set())


def verdict(name):
    """What an operator does on MPS: "runs", "calls" other operators, or is "missing"."""
    keys = keys_of(CHOSEN_BY_DEVICE.get(name, name))
    if "MPS" in keys:
        return "runs"
    return "calls" if not keys or any(key.startswith("Composite") for key in keys) else "missing"


class Trace:
    """Collect the operators of the `with` block that MPS lacks, and those that make float64."""

    def __init__(self):
        self.seen, self.missing = set(), set()

    def __enter__(self):
        # The profiler sees the calls inside composite operators too.
        config = _ExperimentalConfig(capture_overload_names=True)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU], acc_events=True, experimental_config=config
        )
        self.doubles = Doubles(self.missing)
        self.profiler.__enter__()
        self.doubles.__enter__()

    def __exit__(self, *error):
        self.doubles.__exit__(*error)
        self.profiler.__exit__(*error)
        for event in self.profiler.events():
            if event.cpu_parent is None:
                self.look_up(event)

    def look_up(self, event):
        name = event.name + (f".{event.overload_name}" if event.overload_name else "")
        found = "calls"  # whatever is not aten's: autograd, the scan, the optimizer
        if name.startswith("aten::"):
            self.seen.add(name)
            found = verdict(name)
        if found == "missing":
            self.missing.add(name)
        if found == "calls":
            for child in event.cpu_children:
                self.look_up(child)


class Doubles(TorchDispatchMode):
    """Report operators that return float64, which MPS has not."""

    def __init__(self, report):
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A number beside a tensor is float64 without dimensions, and does no harm.
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.dtype == torch.float64:
                self.report.add(f"{func.name()} in float64")
        return result


@pytest.fixture
def trace(monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_SCAN_BACKEND", "chunked")
    monkeypatch.setenv("MAMBA_ASR_CONV_BACKEND", "torch")
    block_shape = chunked.block_shape
    monkeypatch.setattr(chunked, "block_shape", lambda device, *sizes: block_shape("mps", *sizes))
    with sdpa_kernel(SDPBackend.MATH):
        yield Trace()


def x_and_lengths(channels):
    torch.manual_seed(0)
    return torch.randn(3, 100, channels, requires_grad=True), torch.tensor([100, 61, 1])


MIXERS = {
    "relative": (partial(RelPosAttention, num_heads=2, dropout=0.1), False),
    "rotary": (partial(RoPEAttention, num_heads=2, dropout=0.1), False),
    "bimamba": (BiMamba, False),
    "mamba": (Mamba, True),
    "bimamba2": (BiMamba2, False),
    "mamba2": (Mamba2, True),
}


@pytest.mark.parametrize("name", MIXERS)
def test_encoder(name, trace):
    mixer, causal = MIXERS[name]
    activation = nn.GELU if "mamba" in name else nn.SiLU
    encoder = Encoder(10, 16, 24, 1, mixer, activation=activation, causal=causal)
    x, lengths = x_and_lengths(10)
    with trace:
        y, _ = encoder(x, lengths)
        y.sum().backward()
    assert x.grad is not None
    assert {"aten::native_layer_norm_backward", "aten::convolution_backward"} <= trace.seen
    assert not trace.missing


def test_scan_in_chunks_side_by_side(trace):
    """The layout that only GPUs use is the one that is traced."""
    assert chunked.blocks(100, *chunked.block_shape("cpu", 3 * 32 * 16, 100))[0][1] > 1


@pytest.mark.parametrize("mixer", [Mamba, Mamba2])
@torch.no_grad()
def test_streaming(mixer, trace):
    encoder = Encoder(10, 16, 24, 1, mixer, causal=True).eval()
    x, lengths = x_and_lengths(10)
    with trace:
        encoder(x, lengths, encoder.initial_state(3))
    assert not trace.missing


LAYERS = {
    "transformer": partial(TransformerDecoderLayer, num_heads=2),
    "mamba": MambaDecoderLayer,
}


@pytest.mark.parametrize("name", LAYERS)
def test_decoder(name, trace):
    decoder = Decoder(11, 16, 24, 1, LAYERS[name])
    memory, memory_lengths = x_and_lengths(16)
    with trace:
        tokens = torch.randint(1, 11, (3, 50))
        y, _ = decoder(tokens, torch.tensor([50, 1, 20]), memory, memory_lengths)
        y.sum().backward()
    assert memory.grad is not None
    assert "aten::embedding_dense_backward" in trace.seen
    assert not trace.missing


def test_from_waveform_to_frontend(trace):
    fbank, normalize, frontend = Features(n_fft=512), InputNormalization(), ConvFrontend()
    fbank.mels = fbank.short_mels  # as elsewhere than on a CPU
    with trace:
        x, lengths = fbank(torch.randn(2, 16000), torch.tensor([16000, 8000]))
        x = normalize(x, lengths / 101, epoch=0)
        y, _ = frontend(x, lengths)
        y.sum().backward()
    assert "aten::_fft_r2c" in trace.seen
    assert not trace.missing


def test_losses_and_optimizer(trace):
    heads = nn.ModuleDict({"ctc": nn.Linear(8, 11), "seq": nn.Linear(8, 11)})
    optimizer = torch.optim.AdamW(parameter_groups(heads, 0.01), betas=(0.9, 0.98), eps=1e-9)
    tokens, token_lengths = torch.randint(3, 11, (3, 6)), torch.tensor([6, 2, 4])
    x, lengths = x_and_lengths(8)
    with trace:
        logits = heads["ctc"](x)
        sequence = heads["seq"](x[:, :6]).log_softmax(-1)
        loss = sum(sequence_loss(sequence, tokens, token_lengths, s) for s in (0.0, 0.1))
    # `ctc_loss` goes to the CPU when it finds itself on MPS: it is no part of the path.
    on_cpu = logits.detach().requires_grad_()
    ctc_loss(on_cpu, tokens, lengths, token_lengths).backward()
    with trace:
        torch.autograd.backward([logits, loss], [on_cpu.grad.to(x.device), None])
        gradients = gradients_of(optimizer)
        clip(gradients, torch.nn.utils.get_total_norm(gradients), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    assert {"aten::_log_softmax_backward_data", "aten::addcdiv_"} <= trace.seen
    assert not trace.missing


def test_an_operator_without_a_kernel_is_found(trace):
    with trace:
        nn.functional.ctc_loss(
            torch.randn(9, 1, 5).log_softmax(-1), torch.ones(1, 2).long(), [9], [2]
        )
    assert trace.missing == {"aten::_ctc_loss"}


def test_an_operator_without_a_kernel_is_found_inside_another(trace):
    with trace:
        torch.linalg.eigvals(torch.eye(3))
        torch.ones(3).double().add(1)
    assert "aten::linalg_eig" in trace.missing
    assert {"aten::_to_copy in float64", "aten::add.Tensor in float64"} <= trace.missing


def test_the_table_knows_what_mps_has():
    for name in ("aten::mm", "aten::exp", "aten::_fft_r2c", "aten::convolution"):
        assert verdict(name) == "runs"
    for name in ("aten::matmul", "aten::clone", "aten::stft"):
        assert verdict(name) == "calls"
    for name in ("aten::_ctc_loss", "aten::_ctc_loss_backward", "aten::geqrf"):
        assert verdict(name) == "missing"
