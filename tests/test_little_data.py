"""What helps training on little data: views, inner layers, left-out branches, noise and rooms."""

import json
import math

import pytest
import torch
from speechbrain import Stage
from torch import nn
from torch.nn import functional as F  # noqa: N812

from inference import Recognizer
from inference.package import package
from modules import launch
from modules.augmentation import Reverberation, coloured_noise
from modules.encoder import Encoder
from modules.encoder_layer import DropPath
from modules.errors import UserError
from modules.fourier import transform_length
from modules.losses import consistency_loss
from modules.mamba import BiMamba
from modules.waveforms import Batch
from tests.recipes import runs
from tests.test_package import hypotheses, recordings

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"
WORDS = "CTC/conmamba_subword_small.yaml"


# ---- Two views ----


def test_consistency_is_the_divergence_of_each_view_from_the_other():
    logits = torch.randn(4, 7, 5, dtype=torch.float64)
    lengths = torch.tensor([7, 7, 3, 3])
    expected = 0.0
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        for t in range(lengths[a]):
            p, q = logits[b, t].softmax(-1), logits[a, t].softmax(-1)
            expected += (p * (p / q).log()).sum() / 4
    assert consistency_loss(logits, lengths) == pytest.approx(expected)
    # What is past an utterance's end does not count, whatever it is.
    logits[2:, 3:] = math.nan
    assert consistency_loss(logits, lengths) == pytest.approx(expected)


def test_a_view_learns_from_the_other_and_not_for_it():
    logits = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    consistency_loss(logits, torch.tensor([1, 1])).backward()
    own, other = logits.detach().softmax(-1).unbind(0)
    # Of the cross entropy with a fixed target: softmax less target.
    torch.testing.assert_close(logits.grad[0], (own - other) / 2)


# ---- Inner layers ----


def small_encoder(**options):
    return Encoder(12, 16, 24, 3, lambda d: BiMamba(d, d_state=4), 5, dropout=0.0, **options)


def test_a_tapped_layer_gives_what_an_encoder_of_so_many_layers_would():
    encoder = small_encoder().eval()
    x, lengths = torch.randn(2, 9, 12), torch.tensor([9, 5])
    whole, _ = encoder(x, lengths)
    y, _, (first, second) = encoder(x, lengths, taps=[1, 2])
    assert torch.equal(y, whole)
    for count, tapped in ((1, first), (2, second)):
        shorter = small_encoder().eval()
        shorter.load_state_dict(encoder.state_dict())
        shorter.layers = nn.ModuleList(list(encoder.layers)[:count])
        assert torch.equal(tapped, shorter(x, lengths)[0])


# ---- Branches left out ----


def test_branches_are_left_out_by_utterance_and_keep_their_mean():
    drop, x = DropPath(0.25).train(), torch.ones(4000, 3, 2)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, kept[:, None, None] * x / 0.75)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_deeper_layers_lose_more_and_evaluation_nothing():
    encoder = small_encoder(drop_path=0.3, mixer_dropout=0.5)
    rates = [float(layer.drop_path.probability) for layer in encoder.layers]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    plain = small_encoder()
    plain.load_state_dict(encoder.state_dict())  # it has no weights of its own
    x, lengths = torch.randn(2, 9, 12), torch.tensor([9, 5])
    assert torch.equal(encoder.eval()(x, lengths)[0], plain.eval()(x, lengths)[0])
    assert not torch.equal(encoder.train()(x, lengths)[0], plain(x, lengths)[0])


# ---- Rooms and noise ----


def test_a_room_adds_a_tail_after_the_direct_sound():
    torch.manual_seed(0)
    x = torch.zeros(200, 16000)
    x[:, 1000] = 1.0
    y = Reverberation(rt60_low=0.4, rt60_high=0.4, drr_low=3, drr_high=3)(x)
    torch.testing.assert_close(y[:, :1001], x[:, :1001], atol=1e-4, rtol=0)
    energy = y[:, 1001:].square()
    torch.testing.assert_close(energy.sum(1), torch.full((200,), 10**-0.3), rtol=2e-3, atol=0)
    # 60 dB in 0.4 s: 15 dB in 0.1 s.
    early, late = energy[:, :800].mean(), energy[:, 1600:2400].mean()
    assert 10 * torch.log10(early / late) == pytest.approx(15, abs=0.5)


def test_noise_is_of_many_colours():
    torch.manual_seed(0)
    power = torch.fft.rfft(coloured_noise(torch.zeros(64, 16000))).abs().square()
    slope = torch.log(power[:, 10:100].mean(1) / power[:, 1000:8000].mean(1))
    assert slope.min() < 1 and slope.max() > 8
    assert power.isfinite().all()


def test_lengths_of_transforms_are_few():
    lengths = [transform_length(n) for n in range(1, 60 * 16000)]
    assert all(n <= got <= max(1.25 * n, n + 1) for n, got in enumerate(lengths, start=1))
    assert len(set(lengths[16000:])) < 30


@pytest.mark.parametrize(
    ("device", "variable", "kernel", "expected"),
    [
        ("cuda:0", None, "6.8.0-45-generic", ["expandable_segments:True"]),
        ("cuda:0", None, "5.15.167.4-microsoft-standard-WSL2", []),
        ("cuda:0", "PYTORCH_ALLOC_CONF", "6.8.0-45-generic", []),
        ("cuda", "PYTORCH_CUDA_ALLOC_CONF", "6.8.0-45-generic", []),
        ("cpu", None, "6.8.0-45-generic", []),
    ],
)
def test_memory_grows_unless_told_otherwise(device, variable, kernel, expected, monkeypatch):
    given = []
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.setattr(launch.platform, "release", lambda: kernel)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "backend:native")
    launch.let_memory_grow(device)
    assert given == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_of_all_sizes_do_not_fill_a_gpu():
    launch.limit_fft_plans("cuda")
    generator, room = torch.Generator().manual_seed(0), Reverberation()

    def augment(times):
        for _ in range(times):
            utterances, samples = (
                torch.randint(*range_, (), generator=generator).item()
                for range_ in ((1, 64), (16000, 256000))
            )
            coloured_noise(room(torch.randn(utterances, samples, device="cuda")))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    before = augment(100)
    assert before - augment(400) < 500e6
    assert torch.backends.cuda.cufft_plan_cache.size <= launch.FFT_PLANS


# ---- In training ----

EVERYTHING = {
    "number_of_epochs": 1,
    "num_encoder_layers": 2,
    "inter_ctc_layers": "[1]",
    "views": 2,
    "consistency_weight": 0.2,
    "noise_probability": 1,
    "reverberation_probability": 1,
    "drop_path": 0.2,
    "mixer_dropout": 0.1,
}


@pytest.mark.parametrize("name", [CTC, S2S])
def test_a_batch_has_two_different_views_of_each_utterance(name, tmp_path):
    brain, train, valid, _ = runs.build(name, tmp_path, **EVERYTHING)
    whole, seen = brain.compute_objectives, []

    def compute_objectives(predictions, batch, stage):
        loss = whole(predictions, batch, stage)
        features, lengths = brain.features(batch, stage)
        seen.append((stage.name, len(batch), features, lengths, len(predictions[0]), loss))
        return loss

    brain.compute_objectives = compute_objectives
    runs.fit(brain, train, valid)
    training = [s for s in seen if s[0] == "TRAIN"]
    for _, size, features, lengths, outputs, loss in training:
        assert len(features) == len(lengths) == outputs == 2 * size
        assert torch.equal(lengths[::2], lengths[1::2])
        assert not torch.equal(features[::2], features[1::2])
        assert loss.isfinite()
    assert all(outputs == size for stage, size, *_, outputs, _ in seen if stage == "VALID")


def test_the_loss_is_the_weighted_sum_of_all(tmp_path):
    options = {**EVERYTHING, "dropout": 0, "drop_path": 0, "mixer_dropout": 0}
    brain, train, *_ = runs.build(CTC, tmp_path, **options)
    brain.init_optimizers()
    batch = Batch([train[i] for i in range(3)])
    logits, lengths, (tapped,) = brain.compute_forward(batch, Stage.TRAIN)
    tokens, token_lengths = brain.tokens(batch, "tokens", Stage.TRAIN)
    inner = brain.modules.ctc_head(tapped)

    def ctc(logits, step=1):
        log_probs, *others = (
            x[::step] for x in (logits.log_softmax(-1), tokens, lengths, token_lengths)
        )
        return F.ctc_loss(log_probs.transpose(0, 1), *others, reduction="none").mean()

    expected = 0.7 * ctc(logits) + 0.3 * ctc(inner) + 0.2 * consistency_loss(logits, lengths)
    loss = brain.compute_objectives((logits, lengths, [tapped]), batch, Stage.TRAIN)
    torch.testing.assert_close(loss, expected)
    # Validation measures the last layer alone.
    alone = brain.ctc_loss(logits[::2], lengths[::2], batch, Stage.VALID)
    torch.testing.assert_close(alone, ctc(logits, step=2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": 3}, "views=3"),
        ({"consistency_weight": 0.2}, "--views 2"),
        ({"inter_ctc_layers": "[1]", "num_encoder_layers": 1}, r"inter_ctc_layers=\[1\]"),
        ({"noise_probability": 1.5}, "noise_probability=1.5 must be from 0 to 1"),
        ({"drop_path": 1}, "drop_path=1"),
        ({"ema_decay": 1}, "ema_decay=1"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 must be from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        runs.build(CTC, tmp_path, **options)


# ---- Words as tokens ----


def test_words_are_trained_packaged_and_read(tmp_path):
    options = {"token_type": "word", "output_neurons": 3 + len(runs.WORDS), "avg_checkpoints": 1}
    options |= {"number_of_epochs": 30, "lr_model": 0.01, "test_beam_size": 5}
    runs.train(WORDS, tmp_path / "run", **options)
    package(tmp_path / "run", tmp_path / "package")
    labels = json.loads((tmp_path / "package/config.json").read_text())["parts"]["search"]["labels"]
    assert {label.strip("\u2581") for label in labels[3:]} == set(runs.WORDS)
    recognizer = Recognizer.from_folder(tmp_path / "package")
    paths, heard = recordings(tmp_path / "run"), hypotheses(tmp_path / "run")
    assert [recognizer.transcribe(p).text for p in paths.values()] == [heard[n] for n in paths]
    assert any(heard.values())


def test_words_that_training_has_not_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no unit for"):
        runs.build(WORDS, tmp_path, token_type="word", output_neurons=3 + 4)
