"""Compiled dropout: elements are dropped as often as they should be, and independently."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch

from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.dropout import Dropout, draw_together, keep, scramble
from modules.encoder import Encoder
from modules.mamba import BiMamba

SIZE = 2**20


def drawn(p, seed=0):
    """`SIZE` draws, each 0 on average with a variance of 1."""
    torch.manual_seed(seed)
    return (keep(torch.empty(SIZE), p).double() - (1 - p)) / (p * (1 - p)) ** 0.5


def sigmas(products):
    """How far off 0 the mean of independent numbers is, of which each has a variance of 1."""
    return abs(products.mean().item()) * len(products) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_right_share_is_dropped(p):
    assert sigmas(drawn(p)) < 4.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 144, 2048])
def test_neighbours_are_independent(lag):
    x = drawn(0.1)
    assert sigmas(x[lag:] * x[:-lag]) < 4.5


def test_calls_are_independent_and_repeat_with_the_generator():
    first = drawn(0.1)
    assert torch.equal(first, drawn(0.1))
    assert sigmas(first * drawn(0.1, seed=1)) < 4.5


def test_bytes_of_neighbours_are_equally_frequent():
    """Pearson's test over the 256 patterns of eight; its mean is 255, its deviation 22.6."""
    patterns = (drawn(0.5) > 0).view(-1, 8).long() @ 2 ** torch.arange(8)
    counts, expected = torch.bincount(patterns, minlength=256), SIZE / 8 / 256
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 255) < 4.5 * 22.6


def ends(x):
    return x ^ (x >> 16 & 0xFFFF)


def test_scramble_is_the_published_function():
    """By Python's own numbers, which do not overflow."""

    def lowbias32(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 2**16, 2**31 - 1, 2**31, 0xDEADBEEF, 2**32 - 1]
    signed = [x - 2**32 * (x >= 2**31) for x in numbers]
    found = ends(scramble(ends(torch.tensor(signed, dtype=torch.int32))))
    assert [x % 2**32 for x in found.tolist()] == [lowbias32(x) for x in numbers]


def test_ends_between_two_scrambles_only_change_the_second_number():
    generator = torch.Generator().manual_seed(0)
    x, second = torch.randint(-(2**31), 2**31, (2, 1000), generator=generator).int()
    assert torch.equal(ends(ends(x) ^ second), x ^ ends(second))


class Kept(Dropout):
    """What `Dropout` computes when it is compiled for a GPU."""

    def forward(self, x):
        return x * keep(x, self.p, self.keys) if self.training else x


def three_dropouts():
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), Kept(0.3), Kept(0.0), Kept(0.3))
    torch.nn.init.eye_(network[0].weight)
    torch.nn.init.zeros_(network[0].bias)
    draw_together(network)
    return network


def test_numbers_drawn_together_are_each_dropouts_own_and_new_each_time():
    network, x = three_dropouts(), torch.ones(8, 64)
    seen = []
    for _ in range(2):
        y = network(x)
        first, last = (keep(x, 0.3, network[i].keys) for i in (1, 3))
        assert torch.equal(y, (first & last).float())
        assert 0 < (first & last).sum() < first.sum() < x.numel()
        seen.append(y)
    assert not torch.equal(*seen)
    assert network[2].keys is None
    before = network[1].keys
    assert torch.equal(network.eval()(x), x) and network[1].keys is before


def test_numbers_drawn_together_repeat_with_the_generator():
    network, x = three_dropouts(), torch.ones(8, 64)
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    assert torch.equal(network(x), expected)


def test_a_copy_draws_for_itself():
    network, x = three_dropouts(), torch.ones(8, 64)
    other = copy.deepcopy(network)
    network(x)
    before = network[1].keys
    first, second = other(x), other(x)
    assert not torch.equal(first, second)
    assert network[1].keys is before


def test_a_pass_keeps_its_numbers_for_its_backward_pass():
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, keys):
            ctx.save_for_backward(keys)
            return x * keep(x, 0.3, keys)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * keep(gradient, 0.3, *ctx.saved_tensors), None

    network, x = three_dropouts(), torch.ones(8, 64, requires_grad=True)
    network.eval()(x)
    assert network[1].keys is None
    network.train()(x)
    y = Again.apply(x, network[1].keys)
    network(x)  # another pass before the first one's backward pass
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("network", ["encoder", "transformer", "mamba"])
def test_every_dropout_of_a_network_is_used_once(network):
    """Used twice in a pass, it would drop the same elements twice (`draw_together`)."""
    lengths, memory = torch.tensor([9, 5]), torch.randn(2, 9, 8)
    if network == "encoder":
        module = Encoder(8, 8, 32, 2, partial(BiMamba, d_state=2), dropout=0.3, mixer_dropout=0.3)
        inputs = memory, lengths
    else:
        layer = {"transformer": TransformerDecoderLayer, "mamba": MambaDecoderLayer}[network]
        options = {"num_heads": 2} if network == "transformer" else {"d_state": 2}
        layer = partial(layer, dropout=0.3, **options)
        module = Decoder(11, 8, 32, 2, layer)
        inputs = torch.randint(1, 11, (2, 4)), torch.tensor([4, 2]), memory, lengths
    uses = Counter()
    for name, part in module.named_modules():
        if isinstance(part, Dropout):
            part.register_forward_hook(lambda *_, name=name: uses.update([name]))
    module(*inputs)
    assert uses and set(uses.values()) == {1}, uses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_dropout_takes_the_numbers_drawn_together():
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), Dropout(0.3), Dropout(0.3)).cuda()
    draw_together(network)
    x = torch.randn(8, 64, device="cuda")
    for module in network:
        module.compile(dynamic=True)
    for _ in range(3):
        y = network(x)
        (gradient,) = torch.autograd.grad(y.sum(), network[0].bias)
        kept = keep(y, 0.3, network[1].keys) & keep(y, 0.3, network[2].keys)
        torch.testing.assert_close(y, network[0](x) * kept / 0.49, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, kept.sum(0) / 0.49, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dropout_drops_the_gradient_of_what_it_drops(dtype):
    layer = torch.compile(torch.nn.Sequential(torch.nn.GELU(), Dropout(0.1)), dynamic=True)
    for shape in ((32, 400, 256), (7, 33, 256)):
        x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
        torch.manual_seed(0)
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        whole = torch.nn.functional.gelu(x) / 0.9
        kept = y != 0
        assert (kept.double().mean() - 0.9).abs() < 0.01
        torch.testing.assert_close(y, whole * kept, rtol=1e-2, atol=1e-2)
        (theirs,) = torch.autograd.grad((whole * kept).sum(), x)
        told = whole != 0  # a kept zero looks dropped
        torch.testing.assert_close(gradient[told], theirs[told], rtol=2e-2, atol=2e-2)
        torch.manual_seed(0)
        assert torch.equal(layer(x), y)
        assert not torch.equal(layer(x), y)
    torch.testing.assert_close(layer.eval()(x), torch.nn.functional.gelu(x))
