"""What runs without PyTorch equals what runs with it: features, resampling, search, alignment."""

import numpy as np
import pytest
import torch
from speechbrain.processing.features import InputNormalization
from torch import nn
from torchaudio.functional import resample

from inference import align
from inference.export import onnx_file
from inference.export.description import feature_settings
from inference.onnx.audio import open_audio, read, resampled
from inference.onnx.features import Features as NumpyFeatures
from inference.onnx.search import ctc_beam, token_spans
from modules.errors import UserError
from modules.features import Features
from modules.lengths import relative
from modules.search import CTCSearch

RATE = 16000


def noise(samples, seed=0):
    x = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
    return 0.1 * x * np.abs(np.sin(np.arange(samples) / 5000)).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_fft": 512, "win_length": 25, "top_db": None},
        {"n_fft": 400, "win_length": 25, "n_mels": 40},
        {"n_fft": 512, "win_length": 32},
        {"sample_rate": 8000, "n_fft": 256, "n_mels": 23, "top_db": 40.0},
    ],
)
@pytest.mark.parametrize("samples", [1, 159, 160, 24000, 100_000])
def test_features_are_speechbrains(settings, samples):
    theirs = Features(**settings)
    x = noise(samples)
    x[samples // 2 : samples * 2 // 3] = 0  # silence: the floor
    expected, _ = theirs(torch.from_numpy(x)[None], torch.tensor([samples]))
    ours = NumpyFeatures(feature_settings(theirs), settings.get("sample_rate", RATE))
    assert ours(x).dtype == np.float32
    # dB: of float32's noise where a band is nearly empty.
    np.testing.assert_allclose(ours(x), expected[0], atol=2e-2, rtol=0)
    assert np.abs(ours(x) - expected[0].numpy()).mean() < 2e-4


class Normalized(nn.Module):
    """A graph that normalises each utterance by its own statistics, and nothing else."""

    inputs, outputs = ("features", "lengths"), ("log_probs", "frames")
    streaming = False

    def __init__(self):
        super().__init__()
        self.normalize = InputNormalization(norm_type="sentence")

    def forward(self, features, lengths):
        x = self.normalize(features, relative(lengths, features.shape[1]))
        return x, torch.clamp(lengths, min=0)


def test_padding_stays_out_of_the_statistics_in_onnx(tmp_path):
    graph = Normalized().eval()
    inputs = torch.zeros(2, 64, 2), torch.tensor([64, 50])
    run = onnx_file.convert(graph, inputs, tmp_path / "a.onnx", False, {})
    for frames in (150, 322, 333):
        lengths = torch.arange(2, frames + 1)
        # Whose quotient in float32 says more than it is.
        lengths = lengths[lengths.float() / frames * frames > lengths]
        assert len(lengths) > 9
        x = torch.from_numpy(noise(frames * 2)).view(1, frames, 2).repeat(len(lengths), 1, 1)
        x[torch.arange(frames) >= lengths[:, None]] = 1e3
        found, _ = run(x, lengths)
        for row, ours, n in zip(x, found, lengths, strict=True):
            (expected,), _ = graph(row[None, :n], n[None])
            torch.testing.assert_close(ours[:n], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("block", [100, 1111, 10**6])
def test_resampling_is_torchaudios(rate, block):
    x = noise(int(1.3 * rate))
    blocks = [x[i : i + block] for i in range(0, len(x), block)]
    found = np.concatenate(list(resampled(iter(blocks), rate, RATE)))
    expected = x if rate == RATE else resample(torch.from_numpy(x), rate, RATE).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32


def test_audio_that_cannot_be_used():
    for message, audio, rate in (
        ("give a 1-D array", np.zeros((2, 9)), RATE),
        ("give a 1-D array", np.zeros(9), None),
        ("audio of uint8 is unknown", np.zeros(9, dtype=np.uint8), RATE),
        ("not finite", np.array([0.0, np.nan]), RATE),
        ("no samples", np.zeros(0), RATE),
        ("give sound", np.zeros(9), 3),
        ("there is no file", "none.wav", None),
    ):
        with pytest.raises(UserError, match=message):
            list(read(open_audio(audio, rate), RATE))
    (half,) = read(open_audio(np.full(9, 2**14, dtype=np.int16), RATE), RATE)
    assert np.all(half == 0.5)


def posteriors(frames, tokens, sharpness, seed):
    logits = torch.randn(frames, tokens, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += 0.5
    return (sharpness * logits).log_softmax(-1)


@pytest.mark.parametrize("pruning", [(100, -12.0, -1.2), (8, -6.0, -3.0), (3, -20.0, -50.0)])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_the_beam_search_is_the_packages(pruning, sharpness):
    labels = ["", "", "", *"ABCDE "]
    search = CTCSearch(labels, *pruning)
    for seed in range(8):
        log_probs = posteriors(30, len(labels), sharpness, seed)
        (expected,) = search(log_probs[None], torch.tensor([30]))
        ids = ctc_beam(log_probs.numpy(), *pruning)
        assert " ".join("".join(labels[i] for i in ids).split()) == expected
        assert expected


def test_tokens_are_aligned_as_the_package_does():
    for seed in range(21):
        frames, size = (25, seed % 9) if seed < 20 else (400, 130)
        log_probs = posteriors(frames, 9, 2.0, seed)
        tokens = np.random.default_rng(seed).integers(3, 9, size=size).tolist()
        expected = align.token_spans(tokens, log_probs)
        found = token_spans(tokens, log_probs.numpy())
        assert [s[:2] for s in found] == [s[:2] for s in expected]
        np.testing.assert_allclose([s[2] for s in found], [s[2] for s in expected], rtol=1e-5)
    assert token_spans([3, 3, 4], log_probs.numpy()[:3]) is None
