"""On a GPU: the graph of a step gives what the steps give, and both what the CPU gives."""

import pytest
import torch

from modules.search import JointBeamSearch, graph
from tests.search.parts import EOS, LAYERS, make_memory, make_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def captures(monkeypatch):
    """How many steps were captured."""
    taken, capture = [], graph.capture
    monkeypatch.setattr(graph, "capture", lambda step: taken.append(step) or capture(step))
    return taken


def make_search(name, dtype, ctc_weight=0.4):
    parts = [part.to("cuda", dtype) for part in make_parts(LAYERS[name], 40, 0, num_layers=2)]
    with torch.no_grad():
        parts[1].bias[EOS] -= 2
    return JointBeamSearch(*parts, beam_size=6, ctc_weight=ctc_weight)


def memories(dtype):
    """Shapes that come, go and come again; the graph's memory is used by all of them."""
    for seed, lengths in enumerate(
        [(40, 31), (90, 3, 0), (40, 31), (12,), (200, 180, 150), (40, 31)]
    ):
        memory, lengths = make_memory(seed, lengths, padding=0.0)
        yield memory.to("cuda", dtype), lengths.cuda()


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gpu_finds_what_the_cpu_finds(name, ctc_weight, captures):
    """float64, so that nothing but an error can move a hypothesis."""
    search = make_search(name, torch.float64, ctc_weight)
    found = [search(*batch) for batch in memories(torch.float64)]
    assert len(captures) == (6 if name == "mamba" else 0)
    search.cpu()
    for batch, (hypotheses, scores) in zip(memories(torch.float64), found, strict=True):
        expected = search(*(x.cpu() for x in batch))
        assert hypotheses == expected[0]
        # Two devices' sines and logarithms differ in the last float32 digit (2.6e-8 was seen).
        assert scores == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_graph_replays_what_the_steps_do(autocast, captures, monkeypatch):
    search = make_search("mamba", torch.float32)
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        found = [search(*batch) for batch in memories(torch.float32)]
    assert len(captures) == 6
    monkeypatch.setattr(graph, "capturable", lambda step: False)
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        expected = [search(*batch) for batch in memories(torch.float32)]
    assert len(captures) == 6
    for (hypotheses, scores), (expected_hypotheses, expected_scores) in zip(
        found, expected, strict=True
    ):
        assert hypotheses == expected_hypotheses
        assert scores == pytest.approx(expected_scores, abs=1e-4)


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
