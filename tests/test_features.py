"""Features that a GPU computes its own way are SpeechBrain's, and are computed without waiting."""

import copy
import pickle

import pytest
import torch
from speechbrain.processing.features import InputNormalization
from torch.nn import functional as F  # noqa: N812

from modules.augmentation import Reverberation, coloured_noise
from modules.features import Features, standardize
from modules.fourier import irfft, rfft, short_time, transform_length
from tests.test_exact_resume import assert_identical

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("n_fft", [400, 512])
@pytest.mark.parametrize("samples", [1, 159, 160, 161, 12345, 16000])
def test_short_mels_are_speechbrains(n_fft, samples):
    features = Features(n_fft=n_fft)
    wavs = F.pad(0.1 * torch.randn(3, samples), (features.reach, features.reach))
    wavs[2] = 0.0  # an utterance beside others has silence's features, and nothing of theirs
    expected = features.fbank(wavs)
    assert expected.shape == (3, samples // 160 + 1, 80)
    torch.testing.assert_close(features.short_mels(wavs), expected, rtol=0, atol=2e-5)


def test_short_mels_are_float32_under_autocast():
    features, wavs = Features(), torch.randn(2, 16000)
    expected = features.short_mels(wavs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features.short_mels(wavs), expected)


def test_frames_of_one_utterance_are_not_anothers():
    x, window = torch.randn(3, 1000), torch.hamming_window(400)
    whole = short_time(x, window, 160)
    for i in range(3):
        torch.testing.assert_close(short_time(x[i : i + 1], window, 160)[0], whole[i])


def test_constants_are_made_once():
    features, wavs = Features(), torch.randn(2, 16000)
    features.short_mels(wavs)
    before = features.constants
    features.short_mels(wavs)
    assert features.constants is before


def test_copies_compute_the_same():
    features, wavs = Features(n_fft=512), torch.randn(2, 16000)
    features.short_mels(wavs)
    lengths = torch.tensor([16000, 8000])
    expected, _ = features(wavs, lengths)
    for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(other(wavs, lengths)[0], expected)


def test_waveforms_learn_through_features():
    features, lengths = Features(), torch.tensor([4000, 2000])
    wavs = torch.randn(2, 4000).masked_fill(torch.arange(4000) >= lengths[:, None], 0.0)
    gradients = []
    for mels in (features.fbank, features.short_mels):
        features.mels = lambda x, mels=mels: mels(x)
        x = wavs.clone().requires_grad_()
        features(x, lengths)[0].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-2)
    assert gradients[0].abs().max() > 1


@pytest.mark.gpu
@gpu
def test_the_host_waits_in_the_first_call_alone():
    features, wavs = Features(n_fft=512), torch.randn(2, 16000)
    lengths = torch.tensor([16000, 8000])
    expected, _ = features(wavs, lengths)
    wavs, lengths = wavs.cuda(), lengths.cuda()
    first, _ = features(wavs, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, _ = features(wavs, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, first)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-2)
    after, _ = features(wavs.cpu(), lengths.cpu())
    assert torch.equal(after, expected)


@pytest.mark.gpu
@gpu
def test_batches_of_many_sizes_need_few_plans():
    plans = torch.backends.cuda.cufft_plan_cache
    features, reverberate = Features(), Reverberation()
    plans.clear()
    sizes = [(b, n) for b in range(17, 33) for n in range(160000, 176000, 1600)]
    for batch, samples in sizes:
        wavs = torch.randn(batch, samples, device="cuda")
        features(coloured_noise(reverberate(wavs)), torch.full((batch,), samples, device="cuda"))
    # For 160 sizes: 4 numbers of utterances, 2 of samples, there and back; some of frames.
    assert plans.size <= 40


@pytest.mark.gpu
@gpu
def test_transforms_of_more_rows_have_the_same_first_ones():
    x = torch.randn(37, 1000, device="cuda")
    points = transform_length(1000)
    spectrum = torch.fft.rfft(x, points)
    torch.testing.assert_close(rfft(x, points), spectrum)
    torch.testing.assert_close(irfft(spectrum, points), torch.fft.irfft(spectrum, points))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_type": "sentence"}, {"std_norm": False}, {"avoid_padding_norm": True}],
)
@pytest.mark.parametrize("epoch, training", [(1, True), (5, True), (1, False)])
def test_they_are_standardized_as_by_speechbrain(options, epoch, training):
    """In a bin without variance too."""
    torch.manual_seed(0)
    x, lengths = 20 * torch.randn(2, 50, 80) - 30, torch.tensor([50, 25])
    x[..., 7] = -100.0
    results = []
    for way in (InputNormalization.forward, standardize):
        normalize = InputNormalization(update_until_epoch=3, **options)
        normalize(x[:1] + 1, torch.ones(1), 1)
        normalize.train(training)
        given = lengths / 50 if way is InputNormalization.forward else lengths
        results.append((way(normalize, x, given, epoch), normalize.count, normalize.glob_mean))
    assert_identical(results[1], results[0])
