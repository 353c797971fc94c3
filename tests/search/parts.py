"""Tiny decoders, language models and memories for the tests of the searches."""

from functools import partial

import pytest
import torch
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM

from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer

LAYERS = {
    "mamba": partial(MambaDecoderLayer, dropout=0.0, d_state=4),
    "transformer": partial(TransformerDecoderLayer, num_heads=2, dropout=0.0),
}
BOS, EOS = 1, 2
D = 8


def make_parts(layer, vocab_size, seed, num_layers=1, spread=4.0):
    """A random decoder and heads, peaky enough that the best hypotheses differ in score."""
    torch.manual_seed(seed)
    decoder = Decoder(vocab_size, D, 2 * D, num_layers, layer).double().eval()
    head, ctc_head = (torch.nn.Linear(D, vocab_size).double() for _ in range(2))
    with torch.no_grad():
        head.weight.mul_(spread)
        ctc_head.weight.mul_(spread)
    return decoder, head, ctc_head


def make_lm(vocab_size, seed):
    torch.manual_seed(seed)
    return TransformerLM(
        vocab_size, d_model=D, nhead=2, num_encoder_layers=1, d_ffn=2 * D, dropout=0.0
    )


def make_memory(seed, lengths=(7, 4, 1, 0), padding=float("nan")):
    torch.manual_seed(seed)
    memory = torch.randn(len(lengths), max(lengths) + 2, D, dtype=torch.float64)
    for row, length in zip(memory, lengths, strict=True):
        row[length:] = padding
    return memory, torch.tensor(lengths)


def check_equal(found, expected, tolerance=1e-5):
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=tolerance)


def flatten(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for part in state for tensor in flatten(part)]
