"""Gradients of a step that is one batch are written, not added: they are those of autograd.

`test_graphs.py` runs CUDA graphs; here their passes are run anew, on any device.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules import graphs
from modules.accumulation import GradientSum
from modules.casting import sources_of_gradients, with_weights_cast
from modules.optimizers import clip
from tests.test_exact_resume import assert_identical


class Network(nn.Module):
    """With weights to cast that are used once, twice or never, and sizes that leave gaps."""

    def __init__(self):
        super().__init__()
        self.once, self.twice, self.never = (nn.Linear(5, 5) for _ in range(3))
        self.again = self.twice
        self.table = nn.Parameter(torch.rand(9, 5))

    def forward(self, x):
        return (F.linear(self.again(self.twice(torch.relu(self.once(x)))), self.table),)


class Rerun:
    """As a recorded graph, but that its passes are run anew."""

    def __init__(self, run, inputs):
        self.run, self.inputs, self.learns = run, [x.clone() for x in inputs], [True]
        self.forward = SimpleNamespace(replay=self.run_forward)
        self.backward = SimpleNamespace(replay=self.run_backward)

    def run_forward(self):
        with torch.enable_grad():
            self.learnt = self.run.network(*self.inputs)
        self.outputs = [y.detach() for y in self.learnt]
        self.doutputs = [torch.empty_like(y) for y in self.outputs]

    def run_backward(self):
        self.run.leave(self.run.differentiate(self.learnt, self.doutputs))


@pytest.fixture
def parts(monkeypatch):
    """A network, a head behind it which also has the network's table, and the graphs."""
    for name in ("graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(graphs, "_Graph", Rerun)
    monkeypatch.setattr(graphs.TrainingGraphs, "_room", lambda *_: True)
    torch.manual_seed(0)
    network, head = Network(), nn.Linear(9, 3)
    cast = with_weights_cast(network, nn.ModuleList([network]))
    both = nn.ModuleList([network, head])
    run = graphs.TrainingGraphs(cast, both.parameters())
    return both, cast, run


def learn(both, network, i, factor=1.0, discard=False):
    """One batch's gradients: {name: gradient, or None}; to discard it as `FiniteBrain` does."""
    x = torch.randn(1, 64, 5, generator=torch.Generator().manual_seed(i))  # of no other shape
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        (y,) = network(x)
        loss = (both[1](y).float().square().sum() + both[0].table.sum()) * factor
    network.discard = discard
    hooks = [p.register_hook(torch.zeros_like) for p in both.parameters() if discard]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad for name, p in both.named_parameters()}


def expected(both, network, i):
    both.zero_grad(set_to_none=True)
    gradients = learn(both, network, i)
    both.zero_grad(set_to_none=True)
    return gradients


def assert_written(run, gradients, wanted):
    for name, gradient in gradients.items():
        assert torch.equal(
            gradient, torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
        ), name
    total = sum(g.double().square().sum() for g in gradients.values())
    assert run.flat.double().square().sum() == pytest.approx(total.item())
    assert run.attached()


def test_they_are_autograd_s(parts):
    both, cast, run = parts
    for i in range(4):
        wanted = expected(both, cast, i)
        gradients = learn(both, run, i)
        if i == 0:  # without a graph
            assert not run.attached()
            assert_identical(gradients, wanted)
        else:
            assert_written(run, gradients, wanted)
        both.zero_grad(set_to_none=True)
    assert len(run.graphs) == 1


@pytest.mark.parametrize("discards", [False, True])
def test_nothing_is_left_of_a_wrong_batch(parts, discards):
    """What is learnt of it is discarded, or the optimizer skips a step of which all is NaN."""
    both, cast, run = parts
    for i in range(3):
        learn(both, run, i)
        both.zero_grad(set_to_none=True)
    assert run.flat.any()
    learn(both, run, 3, math.nan, discards)
    assert run.attached()
    assert run.flat.isnan().any() == (not discards)
    if discards:
        assert not run.flat.any()
    clip([run.flat], run.flat.norm(), 1.0)
    wanted = expected(both, cast, 4)
    assert_written(run, learn(both, run, 4), wanted)


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_batches_add_up_to_what_autograd_adds(parts, wrong):
    """With a graph or without one; of a batch whose loss is not finite nothing is added."""
    both, cast, run = parts
    total = GradientSum(both.parameters())
    for step in ((0, 1, 2), (3, 4, 5)):
        both.zero_grad(set_to_none=True)
        for i in step:
            if i != wrong:
                gradients = learn(both, cast, i)
        wanted = {name: torch.zeros(()) if g is None else g for name, g in gradients.items()}
        both.zero_grad(set_to_none=True)
        total.forget()
        for i in step:
            learn(both, run, i, math.nan if i == wrong else 1.0)
            total.add(torch.tensor(i != wrong), run.flat if run.attached() else None)
            assert all(p.grad is None for p in both.parameters())
        total.give()
        for name, parameter in both.named_parameters():
            torch.testing.assert_close(
                parameter.grad, wanted[name].expand_as(parameter), rtol=1e-5, atol=1e-5
            )
    assert len(run.graphs) == 1


def test_no_step_between(parts):
    """Gradients that nobody took away are lost."""
    both, cast, run = parts
    wanted = expected(both, cast, 2)
    learn(both, run, 0)
    both.zero_grad(set_to_none=True)
    for i in (1, 2):
        gradients = learn(both, run, i)
    assert_written(run, gradients, wanted)


def test_sources_are_copies_where_they_are_all():
    network = Network()
    names = {p: name for name, p in network.named_parameters()}
    cast = with_weights_cast(network, nn.ModuleList([network]))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = cast(torch.randn(4, 5))
    sources = sources_of_gradients(outputs, network.parameters())
    copies = {n for n, s in zip(names.values(), sources, strict=True) if s not in names}
    assert copies >= {"once.weight", "once.bias"}
    assert not copies & {"table"}
    dy = [torch.ones_like(outputs[0])]
    options = {"allow_unused": True, "retain_graph": True}
    given = torch.autograd.grad(outputs, sources, dy, **options)
    wanted = torch.autograd.grad(outputs, list(network.parameters()), dy, **options)
    for name, g, w in zip(names.values(), given, wanted, strict=True):
        assert (g is None) == (w is None) == ("never" in name)
        if g is not None:
            assert g.dtype == (torch.bfloat16 if name in copies else torch.float32)
            assert torch.equal(g.float(), w)


def test_write_all_takes_any_precision_and_layout():
    targets = [torch.full(size, math.nan) for size in ((3, 4), (5,), (2, 3), (4, 1, 3), (2,))]
    shares = [
        torch.randn(4, 3).t(),
        torch.randn(5).bfloat16(),
        torch.randn(2, 3).half(),
        torch.randn(4, 3).unsqueeze(1),
        None,
    ]
    graphs.write_all(targets, shares)
    for target, share in zip(targets[:-1], shares[:-1], strict=True):
        assert torch.equal(target, share.float())
    assert not targets[-1].any()
