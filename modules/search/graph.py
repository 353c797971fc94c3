"""CUDA graphs of a search: one launch reads the memory, and one a token extends all hypotheses.

A search on a GPU is bound by its launches, hundreds a token, each of a few microseconds of work.
Where nothing changes shape from token to token they are recorded, once for all searches of a shape,
and then replayed (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import collections
import contextlib
import threading
import weakref

import torch

from modules.casting import copy_cast
from modules.few_shapes import FRAMES, TOKENS
from modules.graphs import Ends

CHECK_EVERY = 8  # tokens between two questions to a CUDA device whether the search is over
LIMIT = 32  # graphs of a search, of the shapes that came last
_capturing = threading.Lock()  # also of graphs that go: a generator lists its own without a lock
_idle = collections.defaultdict(list)


def give_back(streams):
    """Keep the streams of a thread that ended, by device, for threads to come.

    PyTorch has 32, and would give the next thread one that a living thread may be capturing.
    """
    for index, stream in streams.items():
        _idle[index].append(stream)


class _Thread(threading.local):
    """What a thread keeps from search to search: its streams, and each search's `_Recordings`."""

    def __init__(self):
        self.streams, self.recordings = {}, weakref.WeakKeyDictionary()
        weakref.finalize(threading.current_thread(), give_back, self.streams).atexit = False


_thread = _Thread()


@contextlib.contextmanager
def side_stream(device):
    """Run on a stream that can be captured: always the same one, as each costs a workspace."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        if index not in _thread.streams:
            with _capturing:
                idle = _idle[index]
                _thread.streams[index] = idle.pop() if idle else torch.cuda.Stream()
        stream = _thread.streams[index]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                yield
        finally:  # after an error too: what still runs reads the caller's tensors
            torch.cuda.current_stream().wait_stream(stream)


def begin(search, memory, lengths, frames, max_tokens):
    """As `search.begin`, by a graph where one can be: a step for `run`. Inside `side_stream`."""
    step = None
    if memory.is_cuda and capturable(search):
        # What is recorded serves later calls too, of which some may be in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            step = recorded(search, memory, lengths, padded(frames, max_tokens))
    return search.begin(memory, lengths, frames, max_tokens) if step is None else step


def recorded(search, memory, lengths, sizes):
    """A search by graphs; None where its state grows or memory is too short for its graphs."""
    kind, recordings = kind_of(search, memory), _thread.recordings.get(search)
    if recordings is None or recordings.kind != kind:
        release(search)
        types = state_types(search, memory, lengths)
        recordings = _thread.recordings[search] = _Recordings(kind, types)
    shape = len(memory), *sizes
    if recordings.types is None or shape in recordings.too_large:
        return None
    try:
        return recordings.begin(search, memory, lengths, sizes)
    except BaseException as error:  # nothing more is recorded in a pool that lacks a graph
        recordings.clear()
        if not isinstance(error, torch.OutOfMemoryError):
            raise
    # Out of the handler, so that the error no longer holds what was recorded.
    torch.cuda.empty_cache()
    recordings.too_large.add(shape)
    return None


def run(step, max_tokens):
    """Call `step`, a `TokenStep` or the graph of one, until its search is over."""
    cuda = step.beams.tokens.is_cuda
    for token in range(max_tokens):
        step()
        if (not cuda or (token + 1) % CHECK_EVERY == 0) and bool(step.beams.done()):
            break


def release(search):
    """Give back the memory of this thread's graphs of a search."""
    recordings = _thread.recordings.pop(search, None)
    if recordings is not None:
        recordings.clear()
        torch.cuda.empty_cache()  # which else keeps it for graphs of this search alone


def capturable(search):
    """Whether a search may be recorded, if its decoder's state does not grow."""
    return search.language_model is None and not search.decoder.training


def kind_of(search, memory):
    """What a graph is recorded with besides shapes: another kind of search needs another graph."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    settings = [x for x in vars(search).items() if isinstance(x[1], int | float)]
    # The addresses that it reads weights from.
    weights = [(p.data_ptr(), p.dtype) for p in search.parameters()]
    return memory.device, memory.dtype, autocast, settings, weights


def state_types(search, memory, lengths):
    """The types of a decoder's state from its first token on; None if the state grows."""
    decoder, one = search.decoder, torch.ones_like(lengths[:1])
    start = decoder.start(memory[:1, :1], one)
    _, state = decoder.advance(one.unsqueeze(1), start)
    if [x.shape for x in leaves(state)] != [x.shape for x in leaves(start)]:
        return None
    return [x.dtype for x in leaves(state)]


class _Recordings:
    """A search's graphs by shapes, in the same memory: a search leaves nothing in it.

    They are those of a copy of the search, which shares its weights: other threads may use the
    modules meanwhile. Under autocast the copy holds those of matrix products in low precision, cast
    anew for each search and not for each token.
    """

    def __init__(self, kind, types):
        self.kind, self.types, self.too_large = kind, types, set()
        self.clear()

    def clear(self):
        """Let go of all graphs and of their memory."""
        with _capturing:
            self.steps, self.search, self.casts, self.pool, self.ends = {}, None, None, None, None

    def begin(self, search, memory, lengths, sizes):
        shape = len(memory), *sizes
        step = self.steps.pop(shape, None)
        if step is None:
            step = self.record(search, memory, lengths, sizes)
        self.steps[shape] = step  # the last one
        if len(self.steps) > LIMIT:
            with _capturing:
                del self.steps[next(iter(self.steps))]
        step.begin(memory, lengths)
        return step

    def record(self, search, memory, lengths, sizes):
        with without_cast_cache():
            first = self.search is None
            if first:
                self.prepare(search, memory, lengths, sizes)
            free, total = torch.cuda.mem_get_info()
            if first or free < total / 8:  # a graph takes none of what the allocator keeps
                torch.cuda.empty_cache()
            with _capturing:
                return _Recorded(self, memory, lengths, sizes)

    def prepare(self, search, memory, lengths, sizes):
        autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else None
        self.search, *self.casts = copy_cast(search, dtype)
        self.pool, self.ends = torch.cuda.graph_pool_handle(), Ends()
        self.cast()
        warm_up(self.search, memory, lengths, sizes)

    def cast(self):
        if self.casts[0]:
            torch._foreach_copy_(*self.casts)


def padded(frames, max_tokens):
    """Sizes of which there are few."""
    return frames + -frames % FRAMES, max_tokens + -max_tokens % TOKENS


def warm_up(search, memory, lengths, sizes):
    """Compile what is compiled, and let libraries settle what they settle at first use.

    After the first token states have the types that they keep; the second runs kernels for these.
    What another shape needs besides may be done while it is recorded.
    """
    step = search.begin(memory, lengths, *sizes)
    step()
    step()


class _Recorded:
    """Searches of one shape: `begin` reads a memory, and each call is one step, a `TokenStep`'s."""

    def __init__(self, recordings, memory, lengths, sizes):
        shape = len(memory), sizes[0], memory.shape[2]
        self.memory = recordings.ends("memory", memory, shape)
        self.lengths = torch.empty_like(lengths)
        self.reading, self.token = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capture(self.reading, recordings.pool):
            recordings.cast()
            step = recordings.search.begin(self.memory, self.lengths, *sizes)
            step.state = as_types(step.state, iter(recordings.types))
        with capture(self.token, recordings.pool):
            write_back(step)
        self.beams = step.beams

    def begin(self, memory, lengths):
        frames = min(memory.shape[1], self.memory.shape[1])
        self.memory[:, :frames].copy_(memory[:, :frames])  # behind are no valid frames
        self.lengths.copy_(lengths)
        self.reading.replay()

    def __call__(self):
        self.token.replay()


@contextlib.contextmanager
def capture(graph, pool):
    """Record what is launched within on the current stream.

    Other threads, of a data loader for instance, may allocate meanwhile. `torch.cuda.graph` would
    also wait for the device and empty the allocator's cache.
    """
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


def without_cast_cache():
    """Autocast as it is, but that no cast which is recorded is kept for what runs afterwards."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)


def as_types(state, types):
    """A nested state with its tensors in these types."""
    if isinstance(state, torch.Tensor):
        return state.to(next(types))
    return type(state)(as_types(part, types) for part in state)


def write_back(step):
    """One step in fixed memory: the new state, reordered, goes where the old one lies."""
    state, predecessors = step.extend()
    overwrite(step.state, state, predecessors)


def overwrite(target, state, index):
    """As `select_hypotheses`, into `target`."""
    if isinstance(state, torch.Tensor):
        if state.dim() == 0:
            target.copy_(state)
        elif state is not target:
            torch.index_select(state, 0, index, out=target)
    else:
        for a, b in zip(target, state, strict=True):
            overwrite(a, b, index)


def leaves(state):
    """All tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [x for part in state for x in leaves(part)]
