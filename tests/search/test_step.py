"""A step of the search: the memory is read once, states have fixed shapes, no host is asked."""

import collections
import gc
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from modules.decoder import Decoder, TransformerDecoderLayer, select_hypotheses
from modules.search import JointBeamSearch, graph
from tests.search.parts import EOS, LAYERS, D, check_equal, flatten, make_memory, make_parts


def begin(search, memory, lengths):
    sizes = search.sizes(lengths)
    return search.begin(memory, lengths, *sizes), sizes[1]


@torch.no_grad()
def test_the_memory_is_read_once_and_its_projection_is_never_copied(layer, monkeypatch):
    decoder, head, ctc_head = make_parts(layer, 9, 0)
    reads, start = [], decoder.start
    monkeypatch.setattr(decoder, "start", lambda m, n: reads.append(len(m)) or start(m, n))
    search = JointBeamSearch(decoder, head, ctc_head, beam_size=4)
    step, max_tokens = begin(search, *make_memory(0, lengths=(6, 5)))
    graph.run(step, max_tokens)
    assert reads == [2]
    for after, before in zip(step.state[1], step.start[1], strict=True):
        if isinstance(decoder.layers[0], TransformerDecoderLayer):
            assert all(a is b for a, b in zip(after[2:], before[2:], strict=True))
            after, before = after[:2], before[:2]
        assert all(a is not b for a, b in zip(flatten(after), flatten(before), strict=True))


def test_states_of_hypotheses_are_independent(layer):
    """Advancing two hypotheses of one utterance leaves no trace in the state they came from."""
    decoder, _, _ = make_parts(layer, 9, 0)
    memory, lengths = make_memory(0, lengths=(6, 5), padding=0.0)
    with torch.no_grad():
        start = select_hypotheses(decoder.start(memory, lengths), torch.tensor([0, 0, 1]))
        kept = [tensor.clone() for tensor in flatten(start[1])]
        decoder.advance(torch.tensor([[3], [4], [5]]), start)
    for tensor, before in zip(flatten(start[1]), kept, strict=True):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0)


@torch.no_grad()
def test_only_a_state_that_does_not_grow_is_recorded():
    memory = make_memory(0, lengths=(6, 5), padding=0.0)
    for name, expected in (("mamba", [torch.int64] + [torch.float64] * 4), ("transformer", None)):
        search = JointBeamSearch(*make_parts(LAYERS[name], 9, 0), beam_size=3, ctc_weight=0.4)
        assert graph.state_types(search, *memory) == expected


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 6, 0), (1,), (0, 0)])
def test_a_search_of_padded_sizes_finds_the_same(layer, lengths):
    """Graphs are of few sizes: frames and tokens that no utterance has change nothing."""
    search = JointBeamSearch(*make_parts(layer, 9, 1), beam_size=4, ctc_weight=0.4)
    memory, lengths = make_memory(1, lengths)
    expected = search(memory, lengths)
    frames, max_tokens = search.sizes(lengths)
    step = search.begin(memory, lengths, *graph.padded(frames, max_tokens))
    graph.run(step, max_tokens)
    check_equal(step.beams.best(), expected, tolerance=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
def test_a_step_in_fixed_memory_equals_one_in_new_memory(ctc_weight, monkeypatch):
    """What a graph records, run as it would be replayed: every tensor stays where it is."""
    parts = make_parts(LAYERS["mamba"], 9, 1, num_layers=2)
    search = JointBeamSearch(*parts, beam_size=4, ctc_weight=ctc_weight)
    memory, lengths = make_memory(1, lengths=(9, 6, 0))
    expected = search(memory, lengths)
    step, max_tokens = begin(search, memory, lengths)
    step()
    places = [tensor.data_ptr() for tensor in tensors_of(step)]
    for _ in range(max_tokens - 1):
        graph.write_back(step)
    assert [tensor.data_ptr() for tensor in tensors_of(step)] == places
    check_equal(step.beams.best(), expected, tolerance=1e-9)


class NoGraph:
    """Where a CUDA graph would record: what is run has been run once."""

    def capture_begin(self, pool, capture_error_mode):
        pass

    def capture_end(self):
        pass

    def replay(self):
        pass


@pytest.fixture
def no_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))


@torch.no_grad()
def test_what_is_recorded_is_the_search(no_graph, monkeypatch):
    """A reading and a token, run as they are recorded: the following tokens find the same."""
    steps, write_back = [], graph.write_back
    monkeypatch.setattr(graph, "write_back", lambda step: steps.append(step) or write_back(step))
    search = JointBeamSearch(*make_parts(LAYERS["mamba"], 9, 1), beam_size=4, ctc_weight=0.4)
    memory, lengths = make_memory(1, lengths=(9, 6, 0))
    expected = search(memory, lengths)
    sizes = graph.padded(*search.sizes(lengths))
    types = graph.state_types(search, memory, lengths)
    recordings = graph._Recordings(graph.kind_of(search, memory), types)
    recordings.prepare(search, memory, lengths, sizes)
    recordings.ends("memory", memory, (3, 64, D)).copy_(0).narrow(1, 0, 11).copy_(memory)
    monkeypatch.setattr(torch, "empty_like", lambda x: x.clone())  # of the lengths
    recorded = recordings.begin(search, memory, lengths, sizes)
    (step,) = steps
    assert recorded.beams is step.beams
    for _ in range(9):
        write_back(step)
    check_equal(recorded.beams.best(), expected, tolerance=1e-9)
    recordings.begin(search, memory, lengths, sizes)
    assert len(steps) == len(recordings.steps) == 1


@torch.no_grad()
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_cannot_be_recorded_leaves_nothing(error, no_graph, monkeypatch):
    """In the second shape's token: the first shape's graphs go too, as they share its memory."""
    search = JointBeamSearch(*make_parts(LAYERS["mamba"], 9, 1), beam_size=4, ctc_weight=0.4)
    batches = [make_memory(seed, lengths) for seed, lengths in enumerate([(9, 6), (3,), (2, 2, 2)])]
    captures, failing, steps = [], [4], []

    def capture_begin(self, pool, capture_error_mode):
        captures.append(pool)
        if len(captures) in failing:
            raise error

    def recorded(memory, lengths):
        step = graph.recorded(search, memory, lengths, (64, 32))
        return step if step is None else steps.append(weakref.ref(step))

    monkeypatch.setattr(NoGraph, "capture_begin", capture_begin)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # of the lengths
    recorded(*batches[0])
    recordings = graph._thread.recordings[search]
    copy = weakref.ref(recordings.search)
    assert len(captures) == 2 and steps[0]() is not None
    if error is torch.OutOfMemoryError:
        assert recorded(*batches[1]) is None
    else:
        with pytest.raises(KeyboardInterrupt):
            recorded(*batches[1])
    assert len(captures) == 4 and not recordings.steps
    assert steps[0]() is None and copy() is None
    # What was too large is not tried again; all else is.
    recorded(*batches[1])
    assert len(captures) == (4 if error is torch.OutOfMemoryError else 6)
    recorded(*batches[2])
    assert recordings.steps.keys() >= {(3, 64, 32)}
    search.release()
    assert not recordings.steps and search not in graph._thread.recordings


def test_streams_of_a_thread_that_ended_serve_another(monkeypatch):
    monkeypatch.setattr(graph, "_idle", collections.defaultdict(list))
    thread = threading.Thread(target=lambda: graph._thread.streams.update({1: "stream"}))
    thread.start()
    thread.join()
    assert not graph._idle
    del thread
    gc.collect()
    assert graph._idle == {1: ["stream"]}


def tensors_of(step):
    """What a step reads that it has not made itself."""
    held = [*vars(step.beams).values(), *flatten(step.state)]
    if step.ctc is not None:
        held += [x for name, x in vars(step.ctc).items() if name != "next_psi"]
    return [x for x in held if isinstance(x, torch.Tensor)]


@torch.no_grad()
def test_steps_past_the_end_change_nothing():
    """A device is asked only every few tokens whether the search is over."""
    parts = make_parts(LAYERS["mamba"], 9, 2)
    with torch.no_grad():
        parts[1].bias[EOS] += 6
    search = JointBeamSearch(*parts, beam_size=3, ctc_weight=0.4)
    memory, lengths = make_memory(2, lengths=(20, 15))
    expected = search(memory, lengths)
    step, max_tokens = begin(search, memory, lengths)
    over = []
    for _ in range(max_tokens):
        step()
        over.append(bool(step.beams.done()))
    assert over.index(True) < max_tokens - 2
    assert all(over[over.index(True) :])
    assert step.beams.best() == expected


class OneDevice(TorchDispatchMode):
    """Refuses to mix devices and to move anything between them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices = {str(x.device) for x in leaves if isinstance(x, torch.Tensor)}
        assert len(devices) <= 1, f"{func} is between {devices}"
        return result


@torch.no_grad()
@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
def test_a_search_never_asks_the_device(layer, ctc_weight, monkeypatch):
    """On fake CUDA tensors, which have shapes and no values: a question to them is an error."""
    for operator in ("STEP", "PREFIX"):
        monkeypatch.setenv(f"MAMBA_ASR_{operator}_BACKEND", "torch")
    with FakeTensorMode():
        with torch.device("cuda"):
            decoder = Decoder(9, D, 2 * D, 2, layer).eval()
            heads = torch.nn.Linear(D, 9), torch.nn.Linear(D, 9)
            memory, lengths = torch.randn(2, 7, D), torch.full((2,), 7)
        search = JointBeamSearch(decoder, *heads, beam_size=4, ctc_weight=ctc_weight)
        with OneDevice():
            step = search.begin(memory, lengths, 7, 8)
            assert step.beams.tokens.device.type == "cuda"
            for _ in range(3):
                step()
        with pytest.raises(DataDependentOutputException):
            bool(step.beams.done())
