"""Joint search: batch equals single, limits hold, wide beams find the best of all."""

import itertools

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from torch.nn import functional as F  # noqa: N812

from modules.search import JointBeamSearch
from tests.search.parts import (
    BOS,
    EOS,
    LAYERS,
    check_equal,
    make_lm,
    make_memory,
    make_parts,
)


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
@pytest.mark.parametrize("beam_size", [1, 12])
@pytest.mark.parametrize("ever_ends", [True, False])
def test_padded_batch_equals_single_utterance(layer, ctc_weight, beam_size, ever_ends):
    for seed in range(2):
        parts = make_parts(layer, 9, seed)
        if not ever_ends:
            with torch.no_grad():
                parts[1].bias[EOS] -= 50
        search = JointBeamSearch(*parts, beam_size=beam_size, ctc_weight=ctc_weight)
        search.use_language_model(make_lm(9, seed), 0.3)
        memory, lengths = make_memory(seed)
        together = search(memory, lengths)
        for i, length in enumerate(lengths.tolist()):
            alone = search(memory[i : i + 1, :length], lengths[i : i + 1])
            check_equal(alone, ([together[0][i]], [together[1][i]]))
            assert len(together[0][i]) <= length
            assert all(score > -1e3 for score in together[1])
        assert not {0, BOS, EOS} & set(itertools.chain(*together[0]))
        if not ever_ends and ctc_weight == 0:
            assert [len(hypothesis) for hypothesis in together[0]] == lengths.tolist()


def test_decode_ratios_bound_each_utterance(layer):
    parts = make_parts(layer, 9, 0)
    memory, lengths = make_memory(0, lengths=(10, 6))
    with torch.no_grad():
        parts[1].bias[EOS] = 30.0
    search = JointBeamSearch(*parts, beam_size=3, min_decode_ratio=0.5)
    assert [len(hypothesis) for hypothesis in search(memory, lengths)[0]] == [5, 3]
    with torch.no_grad():
        parts[1].bias[EOS] = -30.0
    search = JointBeamSearch(*parts, beam_size=3, max_decode_ratio=1.5)
    assert [len(hypothesis) for hypothesis in search(memory, lengths)[0]] == [15, 9]
    search = JointBeamSearch(*parts, beam_size=3, max_decode_ratio=1.5, ctc_weight=0.01)
    assert all(
        len(hypothesis) <= length
        for hypothesis, length in zip(search(memory, lengths)[0], lengths, strict=True)
    )


def test_a_certain_end_passes_the_threshold(layer):
    decoder, head, _ = make_parts(layer, 9, 0)
    with torch.no_grad():
        head.bias[EOS] = 1000.0
    memory, lengths = make_memory(0, lengths=(6, 3))
    hypotheses, scores = JointBeamSearch(decoder, head, beam_size=2)(memory, lengths)
    assert hypotheses == [[], []] and scores == [0.0, 0.0]


def every_hypothesis(parts, lm, memory, ctc_weight, lm_weight, lm_temperature, temperature, tokens):
    """Score each sequence of up to T tokens on its own, with PyTorch's CTC loss."""
    decoder, head, ctc_head = parts
    frames = memory.shape[1]
    for length in range(frames + 1):
        for hypothesis in itertools.product(tokens, repeat=length):
            inputs = torch.tensor([[BOS, *hypothesis]])
            targets = torch.tensor([*hypothesis, EOS])
            lengths = torch.tensor([length + 1])
            x, _ = decoder(inputs, lengths, memory, torch.tensor([frames]))
            att = (head(x[0]) / temperature).log_softmax(-1)
            score = (1 - ctc_weight) * att[range(length + 1), targets].sum()
            ctc = ctc_head(memory[0]).log_softmax(-1).unsqueeze(1)
            score -= ctc_weight * F.ctc_loss(
                ctc, targets[None, :-1], torch.tensor([frames]), lengths - 1, reduction="sum"
            )
            language = (lm(inputs)[0] / lm_temperature).log_softmax(-1)
            score += lm_weight * language[range(length + 1), targets].sum()
            yield float(score) / (length + 1), list(hypothesis)


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all(layer, seed):
    parts = make_parts(layer, 6, seed)
    lm = make_lm(6, seed)
    search = JointBeamSearch(
        *parts, beam_size=40, ctc_weight=0.4, temperature=1.15, using_eos_threshold=False
    )
    search.use_language_model(lm, 0.6, temperature=1.3)
    memory, lengths = make_memory(seed, lengths=(3,))
    hypotheses, scores = search(memory, lengths)
    with torch.no_grad():
        ranked = every_hypothesis(parts, lm, memory[:, :3], 0.4, 0.6, 1.3, 1.15, (3, 4, 5))
        best_score, best = max(ranked)
    assert hypotheses == [best]
    assert scores == pytest.approx([best_score], abs=1e-5)


def test_blocked_candidates_never_count_as_finished(layer):
    """One token to choose from and an end that never comes: blocked candidates fill the beams."""
    parts = make_parts(layer, 4, 3)
    with torch.no_grad():
        parts[1].bias[EOS] -= 50
    memory, lengths = make_memory(3, lengths=(9, 6))
    hypotheses, _ = JointBeamSearch(*parts, beam_size=12)(memory, lengths)
    assert hypotheses == [[3] * 9, [3] * 6]


def test_a_diverged_model_gives_empty_hypotheses(layer):
    parts = make_parts(layer, 9, 0)
    with torch.no_grad():
        parts[1].weight.fill_(float("nan"))
    memory, lengths = make_memory(0, lengths=(4, 2))
    search = JointBeamSearch(*parts, beam_size=3, ctc_weight=0.4)
    assert search(memory, lengths) == ([[], []], [-float("inf")] * 2)


def test_yaml_shares_the_modules():
    parts = load_hyperpyyaml("""
decoder: !new:modules.decoder.Decoder
    vocab_size: 9
    d_model: 8
    d_ffn: 16
    num_layers: 1
    layer: !name:modules.decoder.MambaDecoderLayer
head: !new:torch.nn.Linear [8, 9]
ctc_head: !new:torch.nn.Linear [8, 9]
modules: {decoder: !ref <decoder>, head: !ref <head>, ctc_head: !ref <ctc_head>}
model: !new:torch.nn.ModuleList [[!ref <decoder>, !ref <head>, !ref <ctc_head>]]
search: !new:modules.search.JointBeamSearch
    decoder: !ref <decoder>
    head: !ref <head>
    ctc_head: !ref <ctc_head>
    ctc_weight: 0.4
""")
    search, model = parts["search"], parts["model"]
    assert {id(p) for p in search.parameters()} == {id(p) for p in model.parameters()}
    assert not any("search" in name for name in model.state_dict())
    torch.nn.ModuleDict(parts["modules"]).double().eval()
    memory, lengths = make_memory(0, lengths=(4, 2))
    before = search(memory, lengths)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert search(memory, lengths)[1] != before[1]


def test_a_language_model_can_be_replaced():
    parts = make_parts(LAYERS["transformer"], 9, 0)
    memory, lengths = make_memory(0, lengths=(6, 4))
    search = JointBeamSearch(*parts, beam_size=3, ctc_weight=0.4)
    plain = search(memory, lengths)
    search.use_language_model(make_lm(9, 1), 0.5)
    assert search(memory, lengths)[1] != plain[1]
    search.use_language_model(make_lm(9, 2), 0.0)
    check_equal(search(memory, lengths), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ctc_weight": 1.0}, r"ctc_weight=1.0 is not in \[0, 1\)"),
        ({"ctc_weight": 0.4, "ctc_head": None}, "needs a ctc_head"),
        ({"blank_index": 3}, "blank must be 0"),
        ({"eos_index": 1}, "must differ"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"beam_size": 2.5}, "beam_size=2.5 must be a whole number"),
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"max_decode_ratio": 0}, "max above 0"),
        ({"min_decode_ratio": 0.6, "max_decode_ratio": 0.5}, "0 <= min <= max"),
    ],
)
def test_wrong_settings_are_errors(arguments, message):
    decoder, head, ctc_head = make_parts(LAYERS["transformer"], 9, 0)
    with pytest.raises(ValueError, match=message):
        JointBeamSearch(decoder, head, **{"ctc_head": ctc_head, **arguments})
