"""Compiled layers compute what they compute uncompiled, in one graph for batches of all sizes.

The kernels run in Triton's interpreter, which must be chosen before anything is imported, so the
cases run in processes of their own. The graphs are traced and differentiated as on a GPU, then run
operator by operator.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfigRandomSampler
from torch.utils.checkpoint import CheckpointPolicy

from modules import encoder_layer, heads
from modules.brain import ASRBrain
from modules.compilation import compile_layers
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.dropout import Dropout, draw_together, keep
from modules.encoder import Encoder
from modules.mamba import BiMamba, Mamba
from modules.mamba2 import BiMamba2
from modules.ops.causal_conv1d import causal_conv1d
from modules.ops.state_space_dual.chunked import chunk_frames
from modules.prepared import Prepared
from modules.recomputation import KEPT, policy
from modules.two_mambas import TwoMambas

ROOT = Path(__file__).parents[1]
FOUR = DynChunkTrainConfigRandomSampler(1.0, 4, 4, 0.0, 0, 0)  # the same whenever it is drawn
ENCODERS = {
    "bidirectional": {"mixer": BiMamba},
    "mamba2": {"mixer": partial(BiMamba2, d_head=8)},
    "causal": {"mixer": Mamba, "causal": True},
    "chunked": {"mixer": BiMamba, "chunks": FOUR, "lookahead": 2},
}
DECODER_LAYERS = {
    "transformer": partial(TransformerDecoderLayer, num_heads=2, dropout=0.0),
    "mamba": partial(MambaDecoderLayer, d_state=2, dropout=0.0),
}


def make_encoder(mixer, **options):
    torch.manual_seed(0)
    mixer = partial(mixer, d_state=2)
    return Encoder(8, 8, 8, 2, mixer, kernel_size=5, dropout=0.0, **options)


def learn(encoder, batch, frames):
    """-> the output, and the gradients of a random projection of it."""
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(batch, frames, 8, generator=generator)
    lengths = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    y, _ = encoder(x, lengths)
    encoder.zero_grad()
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return y.detach(), {name: p.grad for name, p in encoder.named_parameters()}


def check_encoder(name):
    """AssertionError unless an encoder is compiled well; run in the interpreter."""
    encoder, sizes = make_encoder(**ENCODERS[name]), ((2, 5), (3, 9))
    if name == "mamba2":
        sizes += (2, 64), (3, 70)  # of more chunks than one, without a rest and with one
    expected = [learn(encoder, *size) for size in sizes]
    compile_layers(encoder, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    for size, (y, gradients) in zip(sizes, expected, strict=True):
        ours, our_gradients = learn(encoder, *size)
        torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=1e-5)
        # Without dropout a first layer's input is a view, which to TorchDynamo is another kind; and
        # what is no longer than a chunk of Mamba-2's another than what is longer.
        graphs = 2 if size[1] <= chunk_frames("cpu") else 4
        assert counters["stats"]["unique_graphs"] <= graphs, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]


class Drop(torch.nn.Module):
    """An activation that drops elements as compiled dropout does on a GPU."""

    p = 0.5

    def forward(self, x):
        return torch.nn.functional.gelu(x) * keep(x, self.p) * (1 / (1 - self.p))


class OnAGPU(Dropout):
    """What `Dropout` computes when it is compiled for a GPU; eager as well."""

    def forward(self, x):
        return x * keep(x, self.p, self.keys) * (1 / (1 - self.p)) if self.training else x


def check_recomputation():
    """AssertionError unless compiled layers learn the same from the little that they keep."""
    counters, found = torch._dynamo.utils.counters, []
    encoder_layer.Dropout = OnAGPU
    for compiled, checkpointing in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        encoder = Encoder(
            8, 8, 32, 3, partial(BiMamba, d_state=2), kernel_size=5, activation=Drop, dropout=0.3,
            drop_path=0.3, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        encoder.input_layer[1].p = 0.0  # PyTorch's, which draws otherwise where it is compiled
        draw_together(encoder)
        if compiled:
            compile_layers(encoder, backend="aot_eager")
        torch.manual_seed(1)
        with counted() as sizes:
            y, gradients = learn(encoder, 2, 9)
        assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]  # of three layers
        assert not counters["graph_break"], counters["graph_break"]
        found.append((y, gradients, sum(sizes.values()) / (2 * 9 * 8) / len(encoder.layers)))
    (y, gradients, _), (_, _, usual), (ours, our_gradients, little) = found
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=1e-5)
    # Numbers a frame and channel. Of the little 3.6 are the scan's states, which are those of 32
    # frames at least, 3 are copies of weights, and 4 are steps, whose product has short rows in a
    # layer as narrow as this.
    assert little < 24 < 60 < usual, (little, usual)


@contextmanager
def counted():
    """Numbers that are kept for a backward pass inside, by their storage."""
    sizes = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() / 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


def teach(decoder, batch, frames):
    """As `learn`, by teacher forcing."""
    generator = torch.Generator().manual_seed(frames)
    memory = torch.randn(batch, frames, 8, generator=generator, requires_grad=True)
    lengths = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    tokens = torch.randint(1, 11, (batch, frames // 2), generator=generator)
    # The encoder's output is no leaf.
    y, _ = decoder(tokens, lengths // 2, memory + 0, lengths)
    decoder.zero_grad()
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    return y.detach(), gradients | {"memory": memory.grad}


def check_decoder(name):
    """AssertionError unless one graph serves a decoder's layers, and its search has none."""
    torch.manual_seed(0)
    decoder, sizes = Decoder(11, 8, 8, 3, DECODER_LAYERS[name]), ((2, 9), (3, 14), (4, 24))
    expected = [teach(decoder, *size) for size in sizes]
    compile_layers(decoder, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    for size, (y, gradients) in zip(sizes, expected, strict=True):
        ours, our_gradients = teach(decoder, *size)
        torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]
    tokens, memory, lengths = torch.tensor([[3, 4], [5, 6]]), torch.randn(2, 9, 8), torch.tensor(9)
    with torch.no_grad():
        state = decoder.start(memory, lengths.expand(2))
        for token in tokens.split(1, dim=1):
            _, state = decoder.advance(token, state)
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]


def check_convolution():
    """A convolution that goes on from a state, which no kernel takes."""

    def convolve(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, initial_state=state, return_state=True)

    torch.manual_seed(0)
    shapes = ((2, 7, 5), (5, 4), (5,), (2, 5, 3))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weights = torch.randn(2, 7, 5), torch.randn(2, 5, 3)
    found = []
    for function in (convolve, torch.compile(convolve, backend="aot_eager")):
        outputs = function(*tensors)
        loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        found.append((*outputs, *torch.autograd.grad(loss, tensors)))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_prepared():
    """AssertionError unless one graph serves layers whose weights are prepared, in all sizes."""
    encoder, sizes = make_encoder(BiMamba).eval(), ((2, 9), (3, 14), (2, 40))
    prepared = Prepared(encoder, torch.nn.ModuleList([encoder]))
    batches = [(torch.randn(*size, 8), torch.full(size[:1], size[1])) for size in sizes]
    with torch.no_grad():
        expected = [encoder(*batch)[0] for batch in batches]
        compile_layers(encoder, backend="aot_eager")
        prepared.refresh()
        for batch, y in zip(batches, expected, strict=True):
            torch.testing.assert_close(prepared(*batch)[0], y, rtol=1e-5, atol=1e-5)
    counters = torch._dynamo.utils.counters
    # Of views, as a first layer's input is without dropout, TorchDynamo makes another.
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.parametrize(
    "check",
    [
        "check_encoder('bidirectional')",
        "check_encoder('causal')",
        pytest.param("check_encoder('chunked')", marks=pytest.mark.slow),
        pytest.param("check_encoder('mamba2')", marks=pytest.mark.slow),
        "check_decoder('transformer')",
        pytest.param("check_decoder('mamba')", marks=pytest.mark.slow),
        "check_convolution()",
        "check_recomputation()",
        "check_prepared()",
    ],
)
def test_compiled_code_computes_the_same(check):
    code = f"quicken(); from tests.test_compile import *; {check}"
    command = [sys.executable, "-c", f"from tests.ops.interpreter import quicken; {code}"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "MAMBA_ASR_SCAN_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_and_decoder_are_compiled(checkpointing, monkeypatch):
    monkeypatch.setattr("torch._dynamo.config.specialize_float", False)  # put back afterwards
    encoder = make_encoder(BiMamba, gradient_checkpointing=checkpointing)
    decoder = Decoder(11, 8, 8, 2, DECODER_LAYERS["transformer"])
    head = torch.nn.Linear(8, 11)
    modules = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder, "ctc_head": head})
    options = {"compile": True, "compile_module_keys": None, "compile_mode": "default"}
    ASRBrain._compile(SimpleNamespace(modules=modules, **options))
    for network in (encoder, decoder):
        assert all(x._compiled_call_impl is not None for x in network.layers)
    assert all(x.recomputes == checkpointing for x in encoder.layers)
    assert head.forward.func is heads.linear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "mixer, checkpointing",
    [(Mamba, False), (BiMamba, False), (BiMamba, True), (TwoMambas, False), (BiMamba2, False)],
)
def test_batches_of_all_sizes_pass_compiled_layers(mixer, checkpointing, monkeypatch):
    """Products of 41 columns, which Inductor would pad to 44 and remember the first batch by."""
    monkeypatch.setattr("torch._inductor.config.force_shape_pad", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)
    encoder = Encoder(
        8, 144, 64, 2, mixer, kernel_size=5, dropout=0.0, gradient_checkpointing=checkpointing
    ).cuda()
    batches = [torch.randn(*size, 8, device="cuda") for size in ((28, 96), (19, 144), (5, 130))]

    def step(x):
        y, _ = encoder(x, torch.full(x.shape[:1], x.shape[1], device="cuda"))
        encoder.zero_grad()
        # Not their squares, whose sum is a constant after a LayerNorm: gradients would be noise.
        torch.manual_seed(len(x))
        (y * torch.randn_like(y)).sum().backward()
        return y.detach(), encoder.layers[0].mixer.in_proj.weight.grad

    expected = [step(x) for x in batches]
    compile_layers(encoder)
    for x, theirs in zip(batches, expected, strict=True):
        for ours, their in zip(step(x), theirs, strict=True):
            torch.testing.assert_close(ours, their, rtol=1e-3, atol=1e-3 * their.abs().max().item())


def test_what_checkpointing_keeps_by_name_are_operators():
    """Of another name they would be made again, and nobody would notice."""
    for name in KEPT:
        operator = getattr(torch.ops.mamba_asr, name.split("::")[1]).default
        assert policy(None, operator) is CheckpointPolicy.MUST_SAVE
