"""CUDA graphs of training and compiled layers learn what autograd learns."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules import graphs
from modules.accumulation import GradientSum
from modules.casting import with_weights_cast
from modules.compilation import compile_layers
from modules.encoder import Encoder
from modules.encoder_layer import DropPath
from modules.mamba import BiMamba
from modules.prepared import Prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(2, 64), (3, 128), (2, 64), (3, 128), (2, 64), (2, 64), (1, 64), (3, 128)]


@pytest.fixture(autouse=True)
def float32_is_float32():
    """SpeechBrain lets matrix products round to TF32, in another order when they are compiled."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make_encoder(dropout=0.0, **options):
    torch.manual_seed(0)
    mixer = partial(BiMamba, d_state=4)
    return Encoder(20, 32, 64, 2, mixer, kernel_size=7, dropout=dropout, **options).cuda()


def batch(shape, i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(*shape, 20, generator=generator).cuda()
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0],), generator=generator)
    weight = torch.randn(*shape, 32, generator=generator).cuda()
    return x, lengths.cuda(), weight


def learn(encoder, run, number, total=None, **autocast):
    """One batch's loss; its gradients are added, by autograd or to a `GradientSum`."""
    x, lengths, weight = batch(SHAPES[number], number)
    with torch.autocast("cuda", torch.bfloat16, **autocast):
        y, lengths_after = run(x, lengths)
    assert torch.equal(lengths_after, lengths)
    loss = (y.float() * weight).sum()
    loss.backward()
    if total is not None:
        total.add(loss.isfinite(), run.flat if run.attached() else None)
    return loss.item()


def assert_same_gradients(ours, theirs, tolerance):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-6)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("bf16", [False, True])
def test_graphs_learn_what_autograd_learns(bf16):
    ours, theirs = make_encoder(), make_encoder()
    run, total = graphs.TrainingGraphs(ours, ours.parameters()), GradientSum(ours.parameters())
    for step in range(0, len(SHAPES), 2):  # two batches a step
        for i in (step, step + 1):
            a = learn(ours, run, i, total, enabled=bf16)
            b = learn(theirs, theirs, i, enabled=bf16)
            assert a == pytest.approx(b, rel=1e-2 if bf16 else 1e-4, abs=1e-2)
        total.give()
        total.forget()
        assert_same_gradients(ours, theirs, 2e-2 if bf16 else 1e-4)
        for module in (ours, theirs):
            module.zero_grad(set_to_none=True)
    assert len(run.graphs) == 2  # the third shape came once


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_written_is_what_would_be_added(bf16, compiled):
    """With a weight behind the network, and after gradients that are NaN."""
    encoder, head = make_encoder(), nn.Parameter(torch.ones(32, device="cuda"))
    if compiled:
        compile_layers(encoder)
    both = nn.ModuleList([encoder, nn.ParameterList([head])])
    network = with_weights_cast(encoder, nn.ModuleList([encoder]))
    run, added = graphs.TrainingGraphs(network, both.parameters()), GradientSum(both.parameters())
    count = 0
    for i in range(len(SHAPES)):
        for way in (network, run):

            def to_the_head(*inputs, way=way):
                y, lengths = way(*inputs)
                return y * head, lengths

            learn(both, to_the_head, i, enabled=bf16)
            if way is network:
                added.forget()
                added.add(torch.tensor(True, device="cuda"))
        if run.attached():
            count += 1
            assert added.flat.any()
            # Alike but for kernels that add in no fixed order.
            rtol, atol = (1e-2, 1e-3) if bf16 else (1e-4, 1e-5)
            atol *= added.flat.abs().max().item()
            torch.testing.assert_close(run.flat, added.flat, rtol=rtol, atol=atol)
            run.flat.mul_(torch.nan)
        both.zero_grad(set_to_none=True)
    assert len(run.graphs) == 2
    assert count == 5


def test_a_discarded_batch_that_is_a_step_has_gradients_of_zero():
    encoder = make_encoder()
    run = graphs.TrainingGraphs(encoder, encoder.parameters())
    for i in (0, 2, 4):
        learn(encoder, run, i, enabled=False)
        encoder.zero_grad(set_to_none=True)
    assert run.flat.any()
    x, lengths, _ = batch(SHAPES[5], 5)
    y, _ = run(x * torch.nan, lengths)
    run.discard = True
    y.sum().backward()
    assert run.attached()
    assert not run.flat.any()


class Dropping(nn.Module):
    """What is left of gelu(weight x): the gradient tells what its backward pass left out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.dropout, self.drop_path = nn.Dropout(0.3), DropPath(0.3)

    def forward(self, x, lengths):
        return self.drop_path(self.dropout(F.gelu(x * self.weight))), lengths


def gradient_of_what_is_left(y, x):
    """(D,), given that weight is 1."""
    x = x.detach().requires_grad_()
    whole = F.gelu(x)
    (slope,) = torch.autograd.grad(whole.sum(), x)
    return (y / whole * slope * x).detach().sum((0, 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_left_out_is_left_out_backward_too(compiled):
    torch.manual_seed(0)
    network = Dropping().cuda()
    if compiled:
        network.compile(dynamic=True)
    run = graphs.TrainingGraphs(network, network.parameters())
    lengths, outputs = torch.tensor([64] * 8).cuda(), []
    for i in range(5):
        x = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(i)).cuda()
        y, _ = run(x, lengths)
        expected = gradient_of_what_is_left(y, x)
        outputs.append((y != 0).float())
        y.sum().backward()
        torch.testing.assert_close(network.weight.grad, expected, rtol=1e-3, atol=1e-2)
        del y  # as in training: a graph is recorded while no batch before it is held
        network.zero_grad(set_to_none=True)
    assert len(run.graphs) == 1
    left = torch.stack(outputs).cpu()
    assert left.mean() == pytest.approx(0.49, abs=0.15)
    assert (left[-1] != left[-2]).any()  # every replay draws anew


def gradient_by_luck(encoder, run, draws=300):
    """Mean over draws of what is left out, and the variance of this mean: {parameter: both}."""
    sums = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in named(encoder)}
    x, lengths, weight = batch((4, 64), 0)
    for _ in range(draws):
        encoder.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            y, _, (tapped,) = run(x, lengths)
        ((y + tapped).float() * weight).sum().backward()
        del y, tapped  # as in training: a graph is recorded while no batch before it is held
        for name, p in named(encoder):
            sums[name][0] += p.grad
            sums[name][1] += p.grad**2
    means = {name: (a / draws, b / draws) for name, (a, b) in sums.items()}
    return {name: (m, (s - m**2) / (draws - 1)) for name, (m, s) in means.items()}


def named(encoder):
    return [(name, p) for name, p in encoder.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("compiled", [False, True])
def test_with_dropout_the_mean_gradient_is_autograd_s(compiled):
    options = {"dropout": 0.2, "mixer_dropout": 0.2, "drop_path": 0.3}
    ours, theirs = make_encoder(**options), make_encoder(**options)
    if compiled:
        compile_layers(ours)

    def network(encoder, x, lengths):
        return encoder(x, lengths, taps=(1,))

    def flat(x, lengths):
        y, lengths, tapped = network(ours, x, lengths)
        return y, lengths, *tapped

    graph = graphs.TrainingGraphs(flat, ours.parameters())

    def by_graph(x, lengths):
        y, lengths, *tapped = graph(x, lengths)
        return y, lengths, tapped

    got = gradient_by_luck(ours, by_graph)
    expected = gradient_by_luck(theirs, partial(network, theirs))
    assert len(graph.graphs) == 1
    for name, (mean, variance) in expected.items():
        error = (got[name][0] - mean).square().sum()
        luck = (got[name][1] + variance).sum()
        assert error < 3 * luck + 1e-4 * mean.square().sum(), name


def test_a_wrong_batch_leaves_the_sum():
    encoder = make_encoder()
    run = graphs.TrainingGraphs(encoder, encoder.parameters())
    total = GradientSum(encoder.parameters())
    for i in (0, 2, 4):
        learn(encoder, run, i, total, enabled=False)
    assert len(run.graphs) == 1
    before = total.flat.clone()
    x, lengths, _ = batch(SHAPES[5], 5)
    y, _ = run(x * torch.nan, lengths)
    loss = y.sum()
    loss.backward()
    assert run.flat.isnan().any()
    total.add(loss.isfinite(), run.flat)
    assert torch.equal(total.flat, before)


def test_graphs_beyond_the_limit_run_without():
    ours, theirs = make_encoder(), make_encoder()
    run = graphs.TrainingGraphs(ours, ours.parameters(), limit=1)
    total = GradientSum(ours.parameters())
    for i in range(len(SHAPES)):
        learn(ours, run, i, total, enabled=False)
        learn(theirs, theirs, i, enabled=False)
    total.give()
    assert len(run.graphs) == 1
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_graphs_without_gradients_give_the_same(bf16, prepares):
    encoder = make_encoder().eval()
    prepared = Prepared(encoder, nn.ModuleList([encoder]))
    run = graphs.Graphs(prepared, before=prepared.refresh) if prepares else graphs.Graphs(encoder)
    outputs = []
    for i, shape in enumerate(SHAPES):
        x, lengths, _ = batch(shape, i)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            outputs.append([*run(x, lengths), *encoder(x, lengths)])
    for y, got, expected, lengths in outputs:  # a later batch must not change an earlier result
        assert torch.equal(got, lengths)
        assert (y - expected).abs().max() < (2e-2 if bf16 else 1e-5)
    assert len(run.graphs) == 2
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=bf16)
    with torch.no_grad(), autocast:  # weights that change, as after an epoch, change the result
        before = run(*batch(SHAPES[0], 0)[:2])[0]
        encoder.input_layer[0].weight.mul_(2)
        after, expected = (f(*batch(SHAPES[0], 0)[:2])[0] for f in (run, encoder))
    assert (after - before).abs().max() > 1e-2
    assert (after - expected).abs().max() < (2e-2 if bf16 else 1e-5)


def test_to_record_compiles_nothing_again():
    encoder = make_encoder()
    compile_layers(encoder)
    run = graphs.TrainingGraphs(encoder, encoder.parameters())
    compiled = torch._dynamo.utils.counters["stats"]
    learn(encoder, run, 0)
    before = compiled["unique_graphs"]
    learn(encoder, run, 2)
    assert len(run.graphs) == 1
    assert compiled["unique_graphs"] == before


def test_compiled_layers_learn_the_same():
    ours, theirs = make_encoder(), make_encoder()
    compile_layers(ours)
    run, total = graphs.TrainingGraphs(ours, ours.parameters()), GradientSum(ours.parameters())
    for i in range(4):
        learn(ours, run, i, total, enabled=False)
        learn(theirs, theirs, i, enabled=False)
    total.give()
    assert_same_gradients(ours, theirs, 1e-4)
