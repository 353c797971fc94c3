"""A decoder's layers get its memory cast once; their gradients are added at once, in float32."""

import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules.compilation import compile_layers, compile_sum
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.graphs import TrainingGraphs
from modules.handing_out import add_up, hand_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {
    "transformer": partial(TransformerDecoderLayer, num_heads=2, dropout=0.0),
    "mamba": partial(MambaDecoderLayer, d_state=4, dropout=0.0),
}
every_decoder = pytest.mark.parametrize("name", LAYERS)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
bf16 = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)


def make_decoder(name):
    torch.manual_seed(0)
    return Decoder(11, 16, 24, 4, LAYERS[name])


def batch(frames=13):
    torch.manual_seed(frames)
    memory = torch.randn(3, frames, 16), torch.tensor([frames, 4, 9])
    return torch.randint(1, 11, (3, 8)), torch.tensor([8, 3, 6]), *memory


def learn(decoder, tokens, lengths, memory, memory_lengths, autocast, recorded=False):
    """-> the output and all gradients, the memory's first; recorded: as a graph's backward pass."""
    memory = memory.clone().requires_grad_()
    with autocast():
        # The encoder's output is no leaf.
        y, _ = decoder(tokens, lengths, memory + 0, memory_lengths)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=recorded):
        return y, *torch.autograd.grad(loss, [memory, *decoder.parameters()])


def plainly(monkeypatch):
    """Have autocast cast the memory in each layer, and autograd add."""
    monkeypatch.setattr("modules.decoder.hand_out", lambda x, number, add: (x,) * number)


class Counting(TorchDispatchMode):
    """Additions and casts of the tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.counts = shape, Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        y = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__.rstrip("_")
        if isinstance(y, torch.Tensor) and y.shape == self.shape and name in ("add", "_to_copy"):
            self.counts[name, y.dtype] += 1
        return y


@every_decoder
@half
def test_under_autocast_the_bits_are_the_same(name, dtype, monkeypatch):
    """Forward the products cast; backward the same float32 sums come in the same order."""
    decoder, inputs = make_decoder(name), batch()
    autocast = partial(torch.autocast, "cpu", dtype, cache_enabled=False)
    ours = learn(decoder, *inputs, autocast)
    plainly(monkeypatch)
    theirs = learn(decoder, *inputs, autocast)
    assert ours[1].dtype == torch.float32 and ours[1].any()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@every_decoder
def test_the_gradients_are_those_of_float32(name):
    decoder, inputs = make_decoder(name), batch()
    _, exact, *_ = learn(decoder, *inputs, partial(torch.autocast, "cpu", enabled=False))
    _, ours, *_ = learn(decoder, *inputs, bf16)
    # A bf16 number has an error of 2^-9 at most; some twenty roundings lie between the two ends.
    assert (ours - exact).norm() < 20 * 2**-9 * exact.norm()
    assert not ours[1, 4:].any()  # the padding's


@half
def test_the_sum_is_in_float32(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 50, 16, requires_grad=True)
    gradients = [torch.randn(2, 50, 16).to(dtype) for _ in range(12)]
    with torch.autocast("cpu", dtype):
        outputs = hand_out(x, 12)
    (total,) = torch.autograd.grad(outputs, x, gradients)
    exact = sum(g.double() for g in gradients)
    # Of each addition, half a unit in the last place of what has come together.
    bound = 11 * 2**-24 * sum(g.double().abs() for g in gradients)
    assert total.dtype == torch.float32
    assert ((total - exact).abs() <= bound).all()
    assert ((sum(gradients) - exact).abs() > 10 * bound).any()


def test_elsewhere_each_reads_the_same_tensor():
    x = torch.randn(2, 5, 16, requires_grad=True)
    for y in (x, x.double(), x.bfloat16()):
        assert all(z is y for z in hand_out(y, 3))
    with bf16():
        for y in (x.double(), x.bfloat16()):  # neither of which autocast casts
            assert all(z is y for z in hand_out(y, 3))


@every_decoder
def test_one_cast_and_no_addition_outside(name):
    decoder, (tokens, lengths, memory, memory_lengths) = make_decoder(name), batch()
    decoder.add_up = lambda tensors: torch.full_like(tensors[0], len(tensors), dtype=torch.float32)
    memory.requires_grad_()
    with bf16(), Counting(memory.shape) as forward:
        y, _ = decoder(tokens, lengths, memory, memory_lengths)
    with Counting(memory.shape) as backward:
        (gradient,) = torch.autograd.grad(y.float().sum(), memory)
    assert forward.counts == {("_to_copy", torch.bfloat16): 1}
    assert not backward.counts
    assert (gradient[0] == len(decoder.layers)).all()


def test_what_is_not_learnt_counts_nothing():
    x = torch.randn(2, 5, 16, requires_grad=True)
    with bf16():
        first, second, third = hand_out(x, 3)
        frozen = hand_out(x.detach(), 2)
    assert not any(y.requires_grad for y in frozen)
    (gradient,) = torch.autograd.grad((first + 2 * third).sum(), x)
    assert (gradient == 3).all()
    detached = second.detach() * x
    (gradient,) = torch.autograd.grad(detached.sum(), x)
    assert torch.equal(gradient, second.float())


def test_compiled_layers_learn_the_same():
    """One graph for the layers and one for the sum, in batches of all sizes."""
    torch._dynamo.reset()
    decoder, batches = make_decoder("transformer"), [batch(frames) for frames in (13, 22, 17)]
    expected = [learn(decoder, *inputs, bf16) for inputs in batches]
    compile_layers(decoder, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for i, inputs in enumerate(batches):
        ours = learn(decoder, *inputs, bf16, recorded=i > 0)
        for our, their in zip(ours, expected[i], strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.skipif(DEVICE == "cpu" and not shutil.which("g++"), reason="Inductor needs a compiler")
def test_the_sum_is_one_kernel(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    compiled = compile_sum("inductor", None)
    for frames in (13, 22):
        tensors = [torch.randn(2, frames, 16, device=DEVICE).bfloat16() for _ in range(6)]
        assert torch.equal(compiled(tensors), add_up(tensors))
    assert torch._inductor.metrics.generated_kernel_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_to_record_compiles_nothing_again():
    torch._dynamo.reset()
    decoder, norm = make_decoder("transformer").cuda(), nn.LayerNorm(16).cuda()
    inputs = [x.cuda() for x in batch()]

    def network(tokens, lengths, memory, memory_lengths):
        return decoder(tokens, lengths, norm(memory), memory_lengths)

    def step(function):
        with torch.autocast("cuda", torch.bfloat16):
            y = function(*inputs)[0][:, : inputs[0].shape[1]]  # graphs give more padding
        weights = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)
        (y.float() * weights).sum().backward()
        gradient = norm.weight.grad.clone()
        for parameter in (*decoder.parameters(), *norm.parameters()):
            parameter.grad = None
        return gradient

    expected = step(network)
    compile_layers(decoder)
    run = TrainingGraphs(network, [*decoder.parameters(), *norm.parameters()])
    compiled = torch._dynamo.utils.counters["stats"]
    gradients, graphs = [step(run)], compiled["unique_graphs"]
    gradients += [step(run) for _ in range(2)]  # recorded and replayed, replayed
    assert len(run.graphs) == 1 and compiled["unique_graphs"] == graphs
    for gradient in gradients:
        assert (gradient - expected).norm() < 2e-2 * expected.norm()
