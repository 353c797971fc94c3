"""Compiled layers compute what they compute uncompiled, in one graph for batches of all sizes.

The kernels run in Triton's interpreter, which must be chosen before anything is imported, so the
cases run in processes of their own. The graphs are traced and differentiated as on a GPU, then run
operator by operator.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from modules.compilation import compile_layers
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.mamba import BiMamba, Mamba

ROOT = Path(__file__).parents[1]
SIZES = ((2, 9), (3, 14))  # utterances, frames


def encoder(mixer, **options):
    mixer = partial(mixer, d_state=2)
    return Encoder(8, 8, 8, 2, mixer, kernel_size=5, dropout=0.0, **options)


def decoder(layer, **options):
    return Decoder(11, 8, 8, 2, partial(layer, dropout=0.0, **options))


MODULES = {
    "conmamba": lambda: encoder(BiMamba),
    "causal": lambda: encoder(Mamba, causal=True),
    "transformer decoder": lambda: decoder(TransformerDecoderLayer, num_heads=2),
    "mamba decoder": lambda: decoder(MambaDecoderLayer, d_state=2),
}


def learn(module, batch, frames):
    """-> the output, and the gradients of a random projection of it."""
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(batch, frames, 8, generator=generator)
    lengths = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    if isinstance(module, Decoder):
        tokens = torch.randint(1, 11, (batch, frames // 2), generator=generator)
        y, _ = module(tokens, lengths // 2, x, lengths)
    else:
        y, _ = module(x, lengths)
    module.zero_grad()
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return y.detach(), {name: p.grad for name, p in module.named_parameters()}


def check(name):
    """AssertionError unless a module of MODULES is compiled well; run in the interpreter."""
    torch.manual_seed(0)
    module = MODULES[name]()
    expected = [learn(module, *size) for size in SIZES]
    compile_layers(module, backend="aot_eager")
    for size, (y, gradients) in zip(SIZES, expected, strict=True):
        ours, our_gradients = learn(module, *size)
        torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                our_gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: key + m
            )
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    # Without dropout a first layer's input is a view, which to TorchDynamo is another kind.
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]


@pytest.mark.parametrize("name", MODULES)
def test_compiled_layers_compute_the_same(name):
    command = [sys.executable, "-c", f"from tests.test_compile import check; check({name!r})"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "MAMBA_ASR_SCAN_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
