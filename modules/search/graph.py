"""CUDA graph of a search's step: one launch a token in place of hundreds.

A step on a GPU is bound by its launches, each of a few microseconds of work. Where nothing changes
shape from token to token, an early token's kernels are recorded and then replayed
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import contextlib
import threading
import weakref

import torch

# Tokens before a graph. After the first one states have the types that they keep; the second runs
# kernels for these, which a search needs once.
WARM_UP = 2
CHECK_EVERY = 8  # tokens between two questions to a CUDA device whether the search is over
_capturing = threading.Lock()


class _Thread(threading.local):
    """What a thread keeps from search to search.

    Streams, graphs whose memory is used again, and with which types a search has been recorded.
    """

    def __init__(self):
        self.streams, self.graphs, self.recorded = {}, {}, weakref.WeakKeyDictionary()


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
            _thread.streams[index] = torch.cuda.Stream()
        stream = _thread.streams[index]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


def run(step, max_tokens):
    """Call `step`, a `TokenStep`, until its search is over; inside `side_stream`."""
    cuda = step.beams.tokens.is_cuda
    replay = step
    for token in range(max_tokens):
        if cuda and replay is step and due(step, token):
            replay = capture(step)
        replay()
        if (not cuda or (token + 1) % CHECK_EVERY == 0) and bool(step.beams.done()):
            break


def due(step, token):
    """Whether the step of this token is to be recorded."""
    warm = token == WARM_UP or (token == 1 and recorded(step))
    return warm and capturable(step)


def capturable(step):
    """Whether the next step has the same shapes as the steps before, which have run."""
    return (
        step.language_model is None
        and not step.search.decoder.training
        and [x.shape for x in leaves(step.state)] == [x.shape for x in leaves(step.start)]
    )


def recorded(step):
    """Whether this thread has recorded a step of the same search, with states of the same types."""
    return types(step) in _thread.recorded.get(step.search, ())


def types(step):
    """What the choice of kernels depends on besides shapes."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return step.beams.tokens.device, autocast, tuple(x.dtype for x in leaves(step.state))


def capture(step):
    """Record a step that writes over its own state -> a function that runs it.

    The first tokens, or those of an earlier search, have warmed up the libraries on this stream,
    and compiled what is compiled. Under autocast the first of this search has made the cached
    weights of low precision, which live until autocast ends, so longer than the graph is replayed.
    What a graph leaves behind it is kept until the next one is there to use it.
    """
    device = torch.cuda.current_device()
    graph, former = torch.cuda.CUDAGraph(), _thread.graphs.get(device)
    pool = () if former is None else (former.pool(),)
    # Other threads, of a data loader for instance, may allocate meanwhile. `torch.cuda.graph`
    # would also empty the allocator's cache, to be filled again by every search.
    with _capturing:
        graph.capture_begin(*pool, capture_error_mode="thread_local")
        try:
            write_back(step)
        finally:
            graph.capture_end()
    _thread.graphs[device] = graph
    _thread.recorded.setdefault(step.search, set()).add(types(step))
    return graph.replay


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
