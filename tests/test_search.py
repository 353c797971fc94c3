"""Searches: carried state equals recomputation, batch equals single, wide beams find the best."""

import itertools
from functools import partial

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from torch.nn import functional as F  # noqa: N812

from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer, select_hypotheses
from modules.errors import UserError
from modules.search import CTCSearch, JointBeamSearch, ctc_greedy

LABELS = ["<blank>", "<bos>", "<eos>", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", " "]
LAYERS = {
    "mamba": partial(MambaDecoderLayer, dropout=0.0, d_state=4),
    "transformer": partial(TransformerDecoderLayer, num_heads=2, dropout=0.0),
}
BOS, EOS = 1, 2
D = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


def make_parts(layer, vocab_size, seed, num_layers=1, spread=4.0):
    """A random decoder and heads, peaky enough that the best hypotheses differ in score."""
    torch.manual_seed(seed)
    decoder = Decoder(vocab_size, D, 2 * D, num_layers, layer).double().eval()
    head, ctc_head = (torch.nn.Linear(D, vocab_size).double() for _ in range(2))
    with torch.no_grad():
        head.weight.mul_(spread)
        ctc_head.weight.mul_(spread)
    return decoder, head, ctc_head


def make_lm(vocab_size, seed):
    torch.manual_seed(seed)
    return TransformerLM(
        vocab_size, d_model=D, nhead=2, num_encoder_layers=1, d_ffn=2 * D, dropout=0.0
    )


def make_memory(seed, lengths=(7, 4, 1, 0), padding=float("nan")):
    torch.manual_seed(seed)
    memory = torch.randn(len(lengths), max(lengths) + 2, D, dtype=torch.float64)
    for row, length in zip(memory, lengths, strict=True):
        row[length:] = padding
    return memory, torch.tensor(lengths)


def check_equal(found, expected, tolerance=1e-5):
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=tolerance)


class Recomputing(JointBeamSearch):
    """Runs the decoder over memory and whole prefix at each step."""

    def _update_reset_memory(self, enc_states, enc_lens):
        _, scorer_memory = super()._update_reset_memory(enc_states, enc_lens)
        prefix = torch.empty(self.n_bh, 0, dtype=torch.long)
        return prefix, scorer_memory

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        prefix = torch.cat([memory, inp_tokens.unsqueeze(1)], dim=1)
        lengths = torch.full((len(prefix),), prefix.shape[1])
        x, _ = self.decoder(prefix, lengths, enc_states, enc_lens)
        log_probs = (self.head(x[:, -1]) / self.temperature).log_softmax(dim=-1)
        log_probs[:, [self.blank_index, self.bos_index]] = self.minus_inf
        return log_probs, prefix, None

    def permute_mem(self, memory, index):
        return memory[index]


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4])
@pytest.mark.parametrize("lm_weight", [0.0, 0.6])
def test_carried_state_equals_recomputation(layer, ctc_weight, lm_weight):
    for seed in range(3):
        parts = make_parts(layer, 11, seed, num_layers=1 + (seed == 0))
        found, expected = (
            kind(*parts, beam_size=5, ctc_weight=ctc_weight, temperature=1.15)
            for kind in (JointBeamSearch, Recomputing)
        )
        if lm_weight:
            lm = make_lm(11, seed)
            for search in (found, expected):
                search.use_language_model(lm, lm_weight, temperature=1.2)
        memory, lengths = make_memory(seed, lengths=(6, 4))
        check_equal(found(memory, lengths), expected(memory, lengths))


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


def test_the_memory_is_read_once_and_its_projection_is_never_copied(layer, monkeypatch):
    decoder, head, ctc_head = make_parts(layer, 9, 0)
    reads, start = [], decoder.start
    monkeypatch.setattr(decoder, "start", lambda m, n: reads.append(len(m)) or start(m, n))
    search = JointBeamSearch(decoder, head, ctc_head, beam_size=4)
    states, permute = [], search.permute_mem

    def keep(memory, index):
        states.append(permute(memory, index))
        return states[-1]

    monkeypatch.setattr(search, "permute_mem", keep)
    memory, lengths = make_memory(0, lengths=(6, 5))
    search(memory, lengths)
    assert reads == [2]
    (_, layers), (_, first_layers) = states[-1]
    for after, before in zip(layers, first_layers, strict=True):
        if isinstance(decoder.layers[0], TransformerDecoderLayer):
            assert all(a is b for a, b in zip(after[2:], before[2:], strict=True))
            after, before = after[:2], before[:2]
        assert all(a is not b for a, b in zip(flatten(after), flatten(before), strict=True))


def flatten(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for part in state for tensor in flatten(part)]


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
        ({"min_decode_ratio": 0.6, "max_decode_ratio": 0.5}, "0 <= min <= max"),
    ],
)
def test_wrong_settings_are_errors(arguments, message):
    decoder, head, ctc_head = make_parts(LAYERS["transformer"], 9, 0)
    with pytest.raises(ValueError, match=message):
        JointBeamSearch(decoder, head, **{"ctc_head": ctc_head, **arguments})


def frames_of(text, repeat=1, sharpness=12.0):
    """Log-probabilities (T, 31) that spell a text, a blank after each letter."""
    ids = [i for c in text for i in [LABELS.index(c)] * repeat + [0]]
    return (sharpness * F.one_hot(torch.tensor(ids, dtype=torch.long), len(LABELS))).log_softmax(-1)


def spell(ids):
    return " ".join("".join(LABELS[i] for i in ids).split())


def as_batch(utterances, filler=float("nan")):
    lengths = torch.tensor([len(x) for x in utterances])
    batch = torch.full((len(utterances), int(lengths.max()) + 3, len(LABELS)), filler)
    for row, x in zip(batch, utterances, strict=True):
        row[: len(x)] = x
    return batch, lengths


TEXTS = ["HELLO  THERE", " IT'S A BEE ", "", " ", "AAB"]


@pytest.mark.parametrize("beam_size", [1, 100])
def test_ctc_reads_peaky_frames(beam_size):
    batch, lengths = as_batch([frames_of(text, repeat=2) for text in TEXTS])
    expected = [" ".join(text.split()) for text in TEXTS]
    assert CTCSearch(LABELS, beam_size=beam_size)(batch, lengths) == expected
    assert [spell(ids) for ids in ctc_greedy(batch, lengths)] == expected


def test_ctc_batch_equals_single_at_every_length():
    """SpeechBrain's own batch call drops the last frame at some of these lengths."""
    search = CTCSearch(LABELS, beam_size=4)
    text = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2
    frames = frames_of(text)[::2]
    for total in (29, 41, 47):
        batch = frames[:total].expand(total, -1, -1)
        lengths = torch.arange(1, total + 1)
        expected = [text[:n] for n in range(1, total + 1)]
        assert search(batch, lengths) == expected
        assert [spell(ids) for ids in ctc_greedy(batch, lengths)] == expected
    torch.manual_seed(0)
    noisy = [(3 * torch.randn(n, len(LABELS))).log_softmax(-1) for n in (17, 12, 1, 0)]
    batch, lengths = as_batch(noisy, filler=7.0)
    together = search(batch, lengths)
    assert together == [search(x[None], n[None])[0] for x, n in zip(noisy, lengths, strict=True)]
    assert together[-1] == "" and ctc_greedy(batch, lengths)[-1] == []


def test_ctc_never_writes_bos_or_eos():
    frames = frames_of("AB")
    frames[:, [BOS, EOS]] = 0.0
    batch, lengths = frames[None], torch.tensor([len(frames)])
    assert CTCSearch(LABELS)(batch, lengths) == ["AB"]
    assert [spell(ids) for ids in ctc_greedy(batch, lengths)] == ["AB"]
    assert frames[0, BOS] == 0.0


def test_ctc_beam_beats_the_best_path():
    """Two frames of 0.6 blank, 0.4 A: path "--" has 0.36, but the paths of A sum to 0.64."""
    frames = torch.full((1, 2, len(LABELS)), 1e-9)
    frames[..., 0], frames[..., LABELS.index("A")] = 0.6, 0.4
    lengths = torch.tensor([2])
    assert ctc_greedy(frames.log(), lengths) == [[]]
    assert CTCSearch(LABELS)(frames.log(), lengths) == ["A"]


def test_ctc_beam_is_no_less_likely_than_the_best_path():
    """Frames between two or three candidates each; the judge is PyTorch's CTC loss."""
    search = CTCSearch(LABELS)
    wins = 0
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.full((1, 12, 31), -9.0)
        x.scatter_(2, torch.stack([torch.randperm(4)[:2] * 3 for _ in range(12)])[None], 0.0)
        x = (x + 0.2 * torch.randn(1, 12, 31)).log_softmax(-1)
        x[..., [BOS, EOS]] = float("-inf")
        beam = [LABELS.index(c) for c in search(x, torch.tensor([12]))[0]]
        greedy = ctc_greedy(x, torch.tensor([12]))[0]
        beam_score, greedy_score = (-ctc_loss(x, ids) for ids in (beam, greedy))
        assert beam_score >= greedy_score - 1e-4
        wins += beam_score > greedy_score + 1e-4
    assert wins >= 5


def ctc_loss(x, ids):
    return F.ctc_loss(
        x.transpose(0, 1),
        torch.tensor([ids]),
        torch.tensor([x.shape[1]]),
        torch.tensor([len(ids)]),
        reduction="sum",
    )


def test_ctc_takes_bfloat16_and_rejects_other_vocabularies():
    frames = frames_of("AB")[None]
    assert CTCSearch(LABELS)(frames.bfloat16(), torch.tensor([4])) == ["AB"]
    with pytest.raises(ValueError, match="31 tokens for 30 labels"):
        CTCSearch(LABELS[:-1])(frames, torch.tensor([4]))


def test_missing_ngram_package_and_file_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "modules.search.ctc.find_spec", lambda name: None if name == "kenlm" else name
    )
    with pytest.raises(UserError, match="pip install kenlm"):
        CTCSearch(LABELS, kenlm_model_path=str(tmp_path / "no.arpa"))
    monkeypatch.setattr("modules.search.ctc.find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"no\.arpa is no file"):
        CTCSearch(LABELS, kenlm_model_path=str(tmp_path / "no.arpa"))


ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
-1.0\t<s>\t-0.5
-1.0\t</s>\t0
-1.0\tSEE\t-0.5
-1.0\tSEA\t-0.5

\\2-grams:
-0.1\t<s> SEA
-2.0\t<s> SEE

\\end\\
"""


def test_an_ngram_decides_between_like_words(tmp_path):
    pytest.importorskip("kenlm")
    pytest.importorskip("pygtrie")
    path = tmp_path / "bigram.arpa"
    path.write_text(ARPA)
    frames = frames_of("SEE").exp()
    frames[4, LABELS.index("E")], frames[4, LABELS.index("A")] = 0.55, 0.45
    batch, lengths = frames.log()[None], torch.tensor([len(frames)])
    assert CTCSearch(LABELS)(batch, lengths) == ["SEE"]
    assert CTCSearch(LABELS, kenlm_model_path=str(path), alpha=1.0)(batch, lengths) == ["SEA"]
