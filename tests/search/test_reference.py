"""The joint search equals SpeechBrain's, whose decoder carries its state or reads all anew."""

import pytest
import torch

from modules.search import JointBeamSearch
from tests.search.parts import BOS, EOS, LAYERS, check_equal, make_lm, make_memory, make_parts
from tests.search.reference import RecomputingSearch, ReferenceSearch


def compare(parts, memory, lengths, lm=None, lm_weight=0.6, reference=ReferenceSearch, **settings):
    searches = [kind(*parts, **settings) for kind in (JointBeamSearch, reference)]
    if lm is not None:
        for search in searches:
            search.use_language_model(lm, lm_weight, temperature=1.2)
    found, expected = (search(memory, lengths) for search in searches)
    check_equal(found, expected)
    return found[0]


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
@pytest.mark.parametrize("lm_weight", [0.0, 0.6])
def test_carried_state_equals_recomputation(layer, ctc_weight, lm_weight):
    for seed in range(3):
        parts = make_parts(layer, 11, seed, num_layers=1 + (seed == 0))
        lm = make_lm(11, seed) if lm_weight else None
        memory, lengths = make_memory(seed, lengths=(6, 4))
        settings = {"beam_size": 5, "ctc_weight": ctc_weight, "temperature": 1.15}
        compare(parts, memory, lengths, lm, lm_weight, RecomputingSearch, **settings)


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("beam_size", [1, 2, 7, 20])
def test_longer_searches_are_speechbrains(layer, ctc_weight, beam_size):
    """More frames than tokens, limits, a vocabulary that fills the beams, and one that cannot."""
    lengths_found = set()
    for seed in range(4):
        parts = make_parts(layer, (5, 30)[seed % 2], seed, spread=(1.0, 4.0)[seed // 2])
        memory, lengths = make_memory(seed, lengths=(25, 3, 17, 0))
        found = compare(parts, memory, lengths, beam_size=beam_size, ctc_weight=ctc_weight)
        lengths_found |= {len(hypothesis) for hypothesis in found}
    assert len(lengths_found) > 3


@pytest.mark.parametrize(
    "settings",
    [
        {"length_normalization": False},
        {"using_eos_threshold": False},
        {"eos_threshold": 1.01},
        {"min_decode_ratio": 0.3, "max_decode_ratio": 0.6},
        {"max_decode_ratio": 2.0, "ctc_weight": 0.2},
        {"temperature": 3.0, "ctc_weight": 0.4},
    ],
    ids=str,
)
def test_every_setting_does_what_speechbrains_does(layer, settings):
    for seed in range(4):
        parts = make_parts(layer, 12, seed, spread=2.0)
        memory, lengths = make_memory(seed, lengths=(12, 7, 1))
        compare(parts, memory, lengths, beam_size=4, **settings)


@pytest.mark.parametrize("bias", [-60.0, -3.0, 3.0, 60.0])
def test_ends_that_never_or_always_come(layer, bias):
    for seed in range(2):
        parts = make_parts(layer, 8, seed)
        with torch.no_grad():
            parts[1].bias[EOS] += bias
        memory, lengths = make_memory(seed, lengths=(11, 6))
        compare(parts, memory, lengths, beam_size=6, ctc_weight=0.4)
        compare(parts, memory, lengths, beam_size=6)


def test_autocast_leaves_scores_in_float32(layer):
    """bfloat16 moves the scores of both searches alike; what they sum up has 24 bits."""
    parts = [part.float() for part in make_parts(layer, 12, 0)]
    memory, lengths = make_memory(0, lengths=(30, 20))
    memory = memory.float()
    search = JointBeamSearch(*parts, beam_size=4, ctc_weight=0.4)
    exact = search(memory, lengths)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = search(memory, lengths)
        expected = ReferenceSearch(*parts, beam_size=4, ctc_weight=0.4)(memory, lengths)
        step = search.begin(memory, lengths, *search.sizes(lengths))
        step()
    check_equal(found, expected, tolerance=0.03)
    assert found[1] == pytest.approx(exact[1], abs=0.2)
    assert step.beams.scores.dtype == torch.float32


def test_bos_and_blank_never_appear():
    parts = make_parts(LAYERS["mamba"], 9, 0)
    with torch.no_grad():
        parts[1].bias[[0, BOS]] += 50
    memory, lengths = make_memory(0, lengths=(9, 5))
    found = compare(parts, memory, lengths, beam_size=5, ctc_weight=0.4)
    assert not {0, BOS, EOS} & {token for hypothesis in found for token in hypothesis}
