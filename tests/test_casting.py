"""Weights that are cast all at once give autocast's numbers."""

from functools import partial

import pytest
import torch
from torch import nn

from modules.attention import RelPosAttention, RoPEAttention
from modules.casting import (
    copy_cast,
    sources_of_gradients,
    weights_of_products,
    with_weights_cast,
)
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.mamba import BiMamba, Mamba
from modules.mamba2 import BiMamba2
from modules.two_mambas import TwoMambas

MIXERS = [
    BiMamba,
    Mamba,
    BiMamba2,
    TwoMambas,
    partial(RelPosAttention, num_heads=4),
    partial(RoPEAttention, num_heads=4),
]
LENGTHS = torch.tensor([40, 25])


def make_encoder(mixer=BiMamba):
    torch.manual_seed(0)
    return Encoder(20, 32, 64, 2, mixer, kernel_size=7, dropout=0.0)


def learn(module, network, *inputs):
    """Output and gradients under autocast, which casts anew at every use."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        y = network(*inputs)
    y.float().square().sum().backward()
    return y, [p.grad for p in module.parameters()]


def assert_same(module, network, inputs, rtol=0.0):
    cast = with_weights_cast(network, nn.ModuleList([module]))
    (ours, gradients), (theirs, expected) = (learn(module, f, *inputs) for f in (cast, network))
    assert torch.equal(ours, theirs)
    for (name, _), g, e in zip(module.named_parameters(), gradients, expected, strict=True):
        assert (g is None) == (e is None), name
        if g is not None:
            assert g.dtype == torch.float32
            error = (g - e).abs().max()
            assert error <= rtol * e.abs().max(), (name, error.item())


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_encoder_learns_the_same(mixer):
    encoder = make_encoder(mixer)
    x = torch.randn(2, 40, 20)
    # BiMamba's projections have a gradient for each utterance, which are added.
    rtol = 1e-2 if mixer is BiMamba else 0.0
    assert_same(encoder, lambda x: encoder(x, LENGTHS)[0], [x], rtol)


@pytest.mark.parametrize(
    ("layer", "rtol"),
    # Its cross Mamba reads memory and tokens: two gradients of each weight are added.
    [(partial(TransformerDecoderLayer, num_heads=4), 0.0), (MambaDecoderLayer, 1e-2)],
)
def test_a_decoder_learns_the_same(layer, rtol):
    torch.manual_seed(0)
    decoder = Decoder(11, 32, 64, 2, partial(layer, dropout=0.0))
    tokens, token_lengths = torch.randint(1, 11, (2, 9)), torch.tensor([9, 5])

    def network(memory):
        return decoder(tokens, token_lengths, memory, LENGTHS)[0]

    assert_same(decoder, network, [torch.randn(2, 40, 32)], rtol)


def test_weights_are_the_modules_own_again_and_in_their_precision():
    encoder = make_encoder()
    before = dict(encoder.named_parameters())
    seen = {}

    def network(x):
        seen.update(encoder.named_parameters())
        seen.update({name: encoder.get_submodule(name[:-7]).weight for name in names(encoder)})
        return encoder(x, LENGTHS)[0]

    cast = with_weights_cast(network, nn.ModuleList([encoder]))
    x = torch.randn(2, 40, 20)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cast(x)
    halves = {name for name, p in seen.items() if p.dtype == torch.bfloat16}
    assert halves >= names(encoder) and len(halves) > 20
    assert not any(n.endswith(("A_log", ".D", "dt_proj.bias", "norm.weight")) for n in halves)
    assert all(p is before[name] for name, p in encoder.named_parameters())
    cast(x)  # without autocast
    assert seen["layers.0.ffn1.0.weight"].dtype == torch.float32


def test_frozen_weights_ask_for_no_gradients():
    first, second = nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 5)
    within = nn.ModuleList([first, second])

    def network(x):
        y = first(x)
        return second(y), y

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        z, y = with_weights_cast(network, within)(torch.randn(2, 5))
        wanted = network(torch.randn(2, 5))
    assert z.requires_grad and not y.requires_grad and not wanted[1].requires_grad
    sources = sources_of_gradients([z], list(second.parameters()))
    gradients = torch.autograd.grad([z], sources, [torch.ones_like(z)])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2
    assert torch.equal(gradients[1], torch.full((5,), 2.0, dtype=torch.bfloat16))


def names(encoder):
    return {name for name, _ in weights_of_products(encoder) if name.endswith(".weight")}


@torch.no_grad()
def test_a_copy_that_is_cast_gives_autocasts_numbers():
    decoder = Decoder(30, 32, 64, 2, partial(MambaDecoderLayer, dropout=0.0)).eval()
    copy, casts, weights = copy_cast(decoder, torch.bfloat16)
    assert len(weights) == len(list(weights_of_products(decoder))) > 0
    torch._foreach_copy_(casts, weights)
    inputs = torch.randint(3, 30, (2, 9)), torch.tensor([9, 5]), torch.randn(2, 40, 32), LENGTHS
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy(*inputs)[0], decoder(*inputs)[0])
    cast = {name for name, _ in weights_of_products(decoder)}
    for (name, ours), theirs in zip(copy.named_parameters(), decoder.parameters(), strict=True):
        assert (ours is theirs) == (name not in cast)
        assert theirs.dtype == torch.float32


def test_a_copy_that_is_not_cast_shares_all_weights():
    decoder = Decoder(30, 32, 64, 1, MambaDecoderLayer)
    copy, casts, weights = copy_cast(decoder, None)
    assert not casts and not weights
    pairs = zip(copy.parameters(), decoder.parameters(), strict=True)
    assert copy is not decoder and all(ours is theirs for ours, theirs in pairs)
