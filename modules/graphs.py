"""CUDA graphs: a network's forward pass is one launch, and in training its backward pass another.

A small model's step is bound by its launches, a thousand and more of a few microseconds of work
each. A batch of a shape that came before is recorded, and replayed from then on
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import logging
import math
import time

import torch

from modules.casting import sources_of_gradients
from modules.few_shapes import few, padded, write_padded

logger = logging.getLogger(__name__)


class Graphs:
    """Runs a network on batches without gradients, from their second one of a shape on by a graph.

    Batches are padded to few shapes, and so are the outputs.

    Arguments
    ---------
    network : callable
        network(*tensors) -> a tuple of tensors. Must not wait for the device, nor look at it.
    limit : int
        Graphs, at most, and only while less than half of the device's memory is taken; other
        shapes run without one. They share memory, but a larger shape fits into little of what
        smaller ones left.
    before : callable
        Called before every batch, not recorded.
    """

    def __init__(self, network, limit=256, before=None):
        self.network, self.limit, self.before = _without_cast_cache(network), limit, before
        self.graphs, self.seen = {}, set()
        self.pool, self.ends = torch.cuda.graph_pool_handle(), Ends()
        self.stream = torch.cuda.Stream()  # one for all, as each costs a workspace
        self.seconds = 0.0

    def __call__(self, *inputs):
        """The network's outputs."""
        if self.before is not None:
            self.before()
        shape = tuple(few(x.shape) for x in inputs)
        if shape not in self.graphs:
            whole = [padded(x) for x in inputs]
            if shape not in self.seen or not self._room(inputs[0].device):
                self.seen.add(shape)
                return self.network(*whole)
            started = time.perf_counter()
            self.graphs[shape] = self.record(whole)
            self.seconds += time.perf_counter() - started
        return self.replay(self.graphs[shape], inputs)

    def record(self, inputs):
        return _ForwardGraph(self, inputs)

    def replay(self, graph, inputs):
        write_padded(graph.inputs, inputs)
        graph.forward.replay()
        return tuple(y.clone() for y in graph.outputs)  # the next batch overwrites them

    def _room(self, device):
        total = torch.cuda.get_device_properties(device).total_memory
        return len(self.graphs) < self.limit and torch.cuda.memory_reserved() < total / 2

    def report(self):
        """Say, once a graph has been made, what they took."""
        if self.seconds:
            logger.info(
                "%d CUDA graphs of %d shapes of batches, recorded in %.1f s",
                len(self.graphs),
                len(self.seen),
                self.seconds,
            )
            self.seconds = 0.0


class TrainingGraphs(Graphs):
    """Runs a network that learns, forward and backward.

    The gradients of its parameters appear in `grad` as if autograd had run where there were none:
    they are written, as they come from matrix products, which is less work than to add them.
    Between a call and its backward pass there may be no other call. One process and one CUDA
    device.

    Arguments, besides those of `Graphs`
    ---------
    parameters : iterable
        What is learnt, by the network or behind it.
    """

    def __init__(self, network, parameters, limit=256):
        super().__init__(network, limit)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.flat, self.gradients, self.gaps, self.anchor = None, None, None, None
        self.discard = False  # of a batch whose loss is not finite nothing is learnt

    def __call__(self, *inputs):
        """The network's outputs."""
        self.discard = False
        return super().__call__(*inputs)

    def record(self, inputs):
        if self.gradients is None:
            self.flat, self.gradients, self.gaps = flat_gradients(self.parameters)
            # Tells autograd that the outputs can be differentiated.
            self.anchor = torch.zeros((), device=inputs[0].device, requires_grad=True)
        return _Graph(self, inputs)

    def replay(self, graph, inputs):
        if self.attached():  # nobody has taken them away
            for parameter in self.parameters:
                parameter.grad = None
        return _Replay.apply(self.anchor, self, graph, *inputs)

    def differentiate(self, outputs, doutputs):
        """The parameters' gradients, or None; those to be written in the precision they come in."""
        sources = sources_of_gradients(outputs, self.parameters)
        return torch.autograd.grad(outputs, sources, doutputs, allow_unused=True)

    def leave(self, given):
        """Leave gradients in `flat`, to be recorded."""
        write_all(self.gradients, given)
        if self.gaps:  # clipped with all the rest by a norm that is NaN, they became NaN
            torch._foreach_zero_(self.gaps)

    def attached(self):
        """Whether the gradients are where the graphs leave them, in `flat`."""
        return self.flat is not None and self.parameters[0].grad is self.gradients[0]

    def attach(self):
        """Let the parameters' gradients be those in `flat`, once a graph has written them.

        What is behind the network brings its own.
        """
        if self.discard:  # nothing was written
            self.flat.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
            parameter.grad = gradient


class Ends:
    """What graphs begin from and end in: of one name in one memory, whichever graph asks."""

    def __init__(self):
        self.memories = {}

    def __call__(self, name, x, shape=None):
        """A tensor like another, or of a shape, in the memory that a name stands for."""
        shape = x.shape if shape is None else shape
        size, memory = math.prod(shape), self.memories.get(name)
        if memory is None or memory.dtype != x.dtype or memory.numel() < size:
            # Half as large again: shapes come in any order, and earlier graphs keep theirs.
            self.memories[name] = memory = x.new_empty(size if memory is None else size * 3 // 2)
        return memory[:size].view(shape)


class _ForwardGraph:
    """A forward pass from and to the addresses of inputs and outputs."""

    def __init__(self, graphs, inputs):
        network = graphs.network
        self.inputs = [graphs.ends(("input", i), x).copy_(x) for i, x in enumerate(inputs)]
        stream = graphs.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries settle here what they settle at first use
            outputs = network(*self.inputs)
            self.outputs = [graphs.ends(("output", i), y) for i, y in enumerate(outputs)]
            del outputs
        torch.cuda.current_stream().wait_stream(stream)
        self.forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **recording(graphs)):
            torch._foreach_copy_(self.outputs, list(network(*self.inputs)))


class _Graph:
    """A forward and a backward pass from and to the addresses of inputs, outputs, doutputs."""

    def __init__(self, graphs, inputs):
        network = graphs.network
        self.inputs = [graphs.ends(("input", i), x).copy_(x) for i, x in enumerate(inputs)]
        stream = graphs.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries settle here what they settle at first use
            outputs = network(*self.inputs)
            self.outputs = [graphs.ends(("output", i), y.detach()) for i, y in enumerate(outputs)]
            self.learns = [y.requires_grad for y in outputs]
            learnt = [y for y in outputs if y.requires_grad]
            self.doutputs = [graphs.ends(("gradient", i), y.detach()) for i, y in enumerate(learnt)]
            graphs.differentiate(learnt, self.doutputs)
            del outputs, learnt
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = recording(graphs)
        with torch.cuda.graph(self.forward, **options):
            outputs = network(*self.inputs)
            torch._foreach_copy_(self.outputs, [y.detach() for y in outputs])
        learnt = [y for y in outputs if y.requires_grad]
        with torch.cuda.graph(self.backward, **options):
            graphs.leave(graphs.differentiate(learnt, self.doutputs))


def recording(graphs):
    """How a graph is recorded: other threads, of a data loader, say, may allocate meanwhile."""
    return {"stream": graphs.stream, "capture_error_mode": "thread_local", "pool": graphs.pool}


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, graphs, graph, *inputs):
        write_padded(graph.inputs, inputs)
        graph.forward.replay()
        ctx.graphs, ctx.graph = graphs, graph
        outputs = tuple(y.view_as(y) for y in graph.outputs)
        ctx.mark_non_differentiable(
            *(y for y, learns in zip(outputs, graph.learns, strict=True) if not learns)
        )
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        graphs, graph = ctx.graphs, ctx.graph
        if not graphs.discard:
            given = [g for g, learns in zip(gradients, graph.learns, strict=True) if learns]
            torch._foreach_copy_(graph.doutputs, given)
            graph.backward.replay()
        graphs.attach()
        return (None,) * (3 + len(graph.inputs))


def flat_gradients(parameters):
    """One tensor of zeros, a view of it like each of the parameters, and the gaps between them."""
    # Kernels for many tensors at once want them aligned.
    sizes = [p.numel() + -p.numel() % 64 for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    parts = list(zip(flat.split(sizes), parameters, strict=True))
    gaps = [part[p.numel() :] for part, p in parts if p.numel() % 64]
    return flat, [part[: p.numel()].view(p.shape) for part, p in parts], gaps


def write_all(targets, shares):
    """Copy to each dense target its share, zeros if it has none, in few launches."""
    zeros, alike = [], {}  # by precision: else all would be copied one by one
    for target, share in zip(targets, shares, strict=True):
        if share is None:
            zeros.append(target)
        elif share.is_contiguous():
            alike.setdefault(share.dtype, []).append((target.view(-1), share.view(-1)))
        else:
            target.copy_(share)
    if zeros:
        torch._foreach_zero_(zeros)
    for pairs in alike.values():
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def _without_cast_cache(network):
    """Under autocast, cast the weights in every call: a graph must hold the casts it needs.

    Calls without a graph do so too, as layers compiled with the cache would be compiled again
    without it.
    """

    def run(*inputs):
        device = inputs[0].device.type
        with torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        ):
            return network(*inputs)

    return run
