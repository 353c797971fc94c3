"""On a GPU: the graph of a step gives what the steps give, and both what the CPU gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modules.search import JointBeamSearch, graph
from tests.search.parts import EOS, LAYERS, make_memory, make_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


SHAPES = 4  # of `memories`, padded


@pytest.fixture
def recorded(monkeypatch):
    """The shapes that were recorded."""
    taken, record = [], graph._Recordings.record
    monkeypatch.setattr(
        graph._Recordings, "record", lambda self, *x: taken.append(x[2]) or record(self, *x)
    )
    return taken


def make_search(name, dtype, ctc_weight=0.4):
    parts = [part.to("cuda", dtype) for part in make_parts(LAYERS[name], 40, 0, num_layers=2)]
    with torch.no_grad():
        parts[1].bias[EOS] -= 2
    return JointBeamSearch(*parts, beam_size=6, ctc_weight=ctc_weight)


def memories(dtype):
    """Shapes that come, go and come again; the graphs' memory is used by all of them."""
    for seed, lengths in enumerate(
        [(40, 31), (90, 3, 0), (40, 31), (12,), (200, 180, 150), (40, 31)]
    ):
        memory, lengths = make_memory(seed, lengths, padding=0.0)
        yield memory.to("cuda", dtype), lengths.cuda()


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gpu_finds_what_the_cpu_finds(name, ctc_weight, recorded):
    """float64, so that nothing but an error can move a hypothesis."""
    search = make_search(name, torch.float64, ctc_weight)
    found = [search(*batch) for batch in memories(torch.float64)]
    assert len(recorded) == (SHAPES if name == "mamba" else 0)
    search.cpu()
    for batch, (hypotheses, scores) in zip(memories(torch.float64), found, strict=True):
        expected = search(*(x.cpu() for x in batch))
        assert hypotheses == expected[0]
        # Two devices' sines and logarithms differ in the last float32 digit (2.6e-8 was seen).
        assert scores == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_graphs_replay_what_the_steps_do(autocast, recorded):
    search = make_search("mamba", torch.float32)
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        for _ in range(2):
            found = [search(*batch) for batch in memories(torch.float32)]
        expected = [step_by_step(search, *batch) for batch in memories(torch.float32)]
    assert len(recorded) == SHAPES
    for (hypotheses, scores), (expected_hypotheses, expected_scores) in zip(
        found, expected, strict=True
    ):
        assert hypotheses == expected_hypotheses
        assert scores == pytest.approx(expected_scores, abs=1e-4)


@torch.no_grad()
def step_by_step(search, memory, lengths):
    """The search without graphs, of the size that they have."""
    with graph.side_stream(memory.device):
        frames, max_tokens = search.sizes(lengths)
        step = search.begin(memory, lengths, *graph.padded(frames, max_tokens))
        graph.run(step, max_tokens)
        return step.beams.best()


def test_searches_keep_no_memory():
    """What one search leaves behind the next uses: the twentieth needs no more than the second."""
    search = make_search("mamba", torch.float32)
    batch = next(memories(torch.float32))
    held = []
    for _ in range(20):
        search(*batch)
        held.append(torch.cuda.memory_reserved())
    assert held[-1] == held[2]


def test_the_next_weights_are_the_ones_used():
    """Weights that change between two searches of one shape are not those of an old graph."""
    search = make_search("mamba", torch.float32)
    batch = next(memories(torch.float32))
    before = search(*batch)
    with torch.no_grad():
        for parameter in search.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert search(*batch)[1] != before[1]


def test_other_settings_and_weights_elsewhere_are_recorded_anew(recorded):
    search = make_search("mamba", torch.float32)
    batch = next(memories(torch.float32))
    before = search(*batch)
    search.ctc_weight = 0.0
    assert search(*batch)[1] != before[1]
    search.ctc_weight = 0.4
    assert search(*batch) == before
    weights = list(search.parameters())  # kept, so that no other lies where they do
    search.load_state_dict({k: 1.1 * x for k, x in search.state_dict().items()}, assign=True)
    assert search(*batch)[1] != before[1]
    search.load_state_dict({k: x / 1.1 for k, x in search.state_dict().items()}, assign=True)
    assert search(*batch)[1] == pytest.approx(before[1], abs=1e-3)
    assert len(recorded) == 5 and len(weights) == len(list(search.parameters()))
    search.release()
    search(*batch)
    assert len(recorded) == 6


def test_where_memory_is_short_the_steps_are_taken(recorded, monkeypatch):
    """The graph of a token does not fit: the search goes on without, also for the next of it."""
    search = make_search("mamba", torch.float32)
    batches = list(memories(torch.float32))
    expected = [search(*batch) for batch in batches]
    search.release()
    recorded.clear()
    write_back = graph.write_back

    def fail(step):
        if len(step.beams.tokens) == 2 * search.beam_size:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        write_back(step)

    monkeypatch.setattr(graph, "write_back", fail)
    for _ in range(2):
        for batch, (hypotheses, scores) in zip(batches, expected, strict=True):
            found = search(*batch)
            assert found[0] == hypotheses and found[1] == pytest.approx(scores, abs=1e-4)
    assert len(recorded) == SHAPES


def test_shapes_that_came_long_ago_are_forgotten(recorded, monkeypatch):
    monkeypatch.setattr(graph, "LIMIT", 2)
    search = make_search("mamba", torch.float32)
    batches = list(memories(torch.float32))[:4]  # of three shapes, the first twice
    found = [search(*batch) for batch in batches * 2]
    assert found[:4] == found[4:]
    assert len(recorded) == 5


@pytest.mark.parametrize("autocast", [False, True])
def test_inference_mode_may_come_and_go(autocast):
    search = make_search("mamba", torch.float32)
    batch = next(memories(torch.float32))
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        with torch.inference_mode():
            found = search(*(x.clone() for x in batch))
        assert search(*batch) == found
        with torch.inference_mode():
            assert search(*(x.clone() for x in batch)) == found


def test_threads_have_graphs_of_their_own():
    """Modules are shared: what one records disturbs no other that searches meanwhile."""
    search = make_search("mamba", torch.float32)
    batches = list(memories(torch.float32)) * 4

    def run(_):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return [search(*batch) for batch in batches]

    expected = run(None)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(run, range(3)):
            assert found == expected
