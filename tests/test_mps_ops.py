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
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.attention import RelPosAttention, RoPEAttention
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.frontend import ConvFrontend
from modules.losses import ctc_loss, sequence_loss
from modules.mamba import BiMamba, Mamba
from modules.ops.selective_scan import chunked
from modules.optimizers import clip_all_groups, parameter_groups

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


def has_kernel(name):
    """Whether the operator runs on MPS itself, or only by calling others that were traced too."""
    keys = keys_of(CHOSEN_BY_DEVICE.get(name, name))
    return not keys or "MPS" in keys or any(key.startswith("CompositeImplicit") for key in keys)


def calls_others(name):
    return name not in CHOSEN_BY_DEVICE and any(
        key.startswith("CompositeExplicit") for key in keys_of(name)
    )


class Trace(TorchDispatchMode):
    """Collect the operators without an MPS kernel, and those that make float64 tensors."""

    def __init__(self):
        super().__init__()
        self.seen, self.missing = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.seen.add(name)
        only_metadata = func.is_view or torch.Tag.inplace_view in func.tags
        if only_metadata or has_kernel(name):
            result = func(*args, **(kwargs or {}))
        elif calls_others(name):
            with self:
                key = torch._C.DispatchKey.CompositeExplicitAutograd
                result = func._op_dk(key, *args, **(kwargs or {}))
        else:
            self.missing.add(name)
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A number next to a tensor is float64 without dimensions, and does no harm.
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.dtype == torch.float64:
                self.missing.add(f"{name} in float64")
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
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_encoder(name, checkpointing, trace):
    mixer, causal = MIXERS[name]
    activation = nn.GELU if name.endswith("mamba") else nn.SiLU
    encoder = Encoder(
        10,
        16,
        24,
        1,
        mixer,
        activation=activation,
        causal=causal,
        gradient_checkpointing=checkpointing,
    )
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


@torch.no_grad()
def test_streaming(trace):
    encoder = Encoder(10, 16, 24, 1, Mamba, causal=True).eval()
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
    fbank, normalize, frontend = Fbank(n_mels=80, n_fft=512), InputNormalization(), ConvFrontend()
    with trace:
        lengths = torch.tensor([101, 51])
        x = normalize(fbank(torch.randn(2, 16000)), lengths / 101, epoch=0)
        y, _ = frontend(x, lengths)
        y.sum().backward()
    assert "aten::_fft_r2c" in trace.seen
    assert not trace.missing


def test_losses_and_optimizer(trace):
    heads = nn.ModuleDict({"ctc": nn.Linear(8, 11), "seq": nn.Linear(8, 11)})
    optimizer = torch.optim.AdamW(parameter_groups(heads, 0.01), betas=(0.9, 0.98), eps=1e-9)
    clip_all_groups(optimizer, 5.0)
    tokens, token_lengths = torch.randint(3, 11, (3, 6)), torch.tensor([6, 2, 4])
    x, lengths = x_and_lengths(8)
    with trace:
        log_probs = heads["ctc"](x).log_softmax(-1)
        sequence = heads["seq"](x[:, :6]).log_softmax(-1)
        loss = sum(sequence_loss(sequence, tokens, token_lengths, s) for s in (0.0, 0.1))
    # `ctc_loss` goes to the CPU when it finds itself on MPS: it is no part of the path.
    on_cpu = log_probs.detach().requires_grad_()
    ctc_loss(on_cpu, tokens, lengths, token_lengths).backward()
    with trace:
        torch.autograd.backward([log_probs, loss], [on_cpu.grad.to(x.device), None])
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


@pytest.mark.parametrize("name", ["aten::mm", "aten::exp", "aten::_fft_r2c", "aten::convolution"])
def test_the_table_knows_what_mps_has(name):
    assert has_kernel(name)


@pytest.mark.parametrize("name", ["aten::_ctc_loss", "aten::geqrf", "aten::_ctc_loss_backward"])
def test_the_table_knows_what_mps_lacks(name):
    assert not has_kernel(name)
    assert not calls_others(name)
