"""Batches of few shapes are the batches with zeros behind them, in a graph's memory too."""

import pytest
import torch

from modules import graphs
from modules.few_shapes import few, padded, write_padded

SHAPES = {(3,): (3,), (3, 5): (3, 32), (3, 32): (3, 32), (2, 65, 4): (2, 128, 4), (2, 0): (2, 0)}


@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_come_behind(shape):
    x = torch.randn(shape)
    y = padded(x)
    assert y.shape == few(x.shape) == SHAPES[shape]
    if len(shape) == 1:
        assert torch.equal(y, x)
    else:
        assert torch.equal(y[:, : shape[1]], x) and not y[:, shape[1] :].any()


def test_nothing_is_left_of_what_was_there():
    inputs = [torch.randn(2, 70, 4), torch.randint(9, (2, 32)), torch.tensor([70, 3])]
    targets = [torch.full(few(x.shape), 7, dtype=x.dtype) for x in inputs]
    write_padded(targets, inputs)
    assert all(map(torch.equal, targets, map(padded, inputs)))


class Again:
    """In place of a CUDA graph: the network once more, from the same memory to the same."""

    def __init__(self, owner, inputs):
        self.network, self.forward = owner.network, self
        self.inputs = [owner.ends(("input", i), x).copy_(x) for i, x in enumerate(inputs)]
        self.outputs = self.network(*self.inputs)

    def replay(self):
        for old, new in zip(self.outputs, self.network(*self.inputs), strict=True):
            old.copy_(new)


def test_a_graph_gets_what_the_network_would(monkeypatch):
    """Batches of other lengths that share it, a shorter one after a longer one too."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(graphs, "_ForwardGraph", Again)
    monkeypatch.setattr(graphs.Graphs, "_room", lambda self, device: True)
    run = graphs.Graphs(lambda x, lengths: (x.cumsum(1), lengths + 1))
    for frames in (100, 128, 90, 65, 64, 128, 30):
        x, lengths = torch.randn(2, frames, 4), torch.tensor([frames, 1])
        y, after = run(x, lengths)
        assert torch.equal(y, padded(x).cumsum(1)) and torch.equal(after, lengths + 1)
    assert len(run.graphs) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_graphs_get_what_the_network_would():
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))

    def network(x, lengths):
        return (x * weight).cumsum(1), lengths + 1

    run = graphs.TrainingGraphs(network, [weight])
    for frames in (100, 128, 90, 65, 128, 70):
        x = torch.randn(2, frames, 4, device="cuda")
        y, _ = run(x, torch.tensor([frames, 1], device="cuda"))
        torch.testing.assert_close(y, padded(x).cumsum(1))
        y.sum().backward()
        expected = padded(x).cumsum(1).sum((0, 1))
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-1)
        del y  # a graph is recorded while no batch before it is held
        weight.grad = None
    assert len(run.graphs) == 1
