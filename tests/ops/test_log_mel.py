"""Features by Triton equal SpeechBrain's, in float64 where they are computed on a CPU.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modules.features import Features
from modules.ops import log_mel
from tests.ops.interpreted import (
    DEVICE,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 13


def reference(features, wavs, lengths):
    """`Features.forward` in float64, by SpeechBrain's filters and a transform of every frame."""
    x = F.pad(wavs.double(), (features.reach, features.reach))
    spectra = torch.fft.rfft(x.unfold(1, features.n_fft, features.hop) * features.window())
    power = spectra.abs().square() @ features.banks().double()
    x = 10 * torch.log10(power.clamp(min=features.fbank.compute_fbanks.amin))
    for i, length in enumerate(lengths // features.hop + 1):
        if features.top_db is not None:
            x[i] = x[i].clamp(min=x[i, :length].max() - features.top_db)
        x[i, length:] = 0.0
    return x.float()


def noise(lengths):
    """Loud and faint noise, zero past each length."""
    generator = torch.Generator().manual_seed(0)
    wavs = torch.randn(len(lengths), max(lengths), generator=generator)
    wavs *= torch.logspace(0, -6, max(lengths))
    lengths = torch.tensor(lengths)
    return wavs.masked_fill(torch.arange(wavs.shape[1]) >= lengths[:, None], 0.0), lengths


@runs_kernels
@pytest.mark.parametrize("top_db", [80.0, None])
@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (1600, 1, 1441)),
        ({"n_fft": 512}, (12000, 11999, 160)),
        ({"n_fft": 512, "n_mels": 40, "sample_rate": 8000}, (4000, 81)),
        ({}, (1,)),
    ],
)
def test_equals_the_reference(options, lengths, top_db):
    features, (wavs, lengths) = Features(top_db=top_db, **options), noise(lengths)
    expected = reference(features, wavs, lengths)
    wavs, lengths = wavs.to(DEVICE), lengths.to(DEVICE)
    assert log_mel.supports(wavs)
    got, frames = features(wavs, lengths)
    assert frames.tolist() == (lengths // features.hop + 1).tolist()
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("n_mels", [1, 40, 80, 300])
def test_bands_are_the_filters_without_their_zeros(n_mels):
    """300 are too many for some to have a bin."""
    banks = Features(n_mels=n_mels).banks()
    bands = log_mel.bands_of(banks)
    whole = torch.zeros(len(banks) + len(bands.weights), n_mels)
    index = bands.firsts.long() + torch.arange(len(bands.weights)).unsqueeze(1)
    assert torch.equal(whole.scatter(0, index, bands.weights)[: len(banks)], banks)
    assert len(bands.weights) == (banks != 0).sum(dim=0).max()


@runs_kernels
def test_an_utterances_features_are_its_own():
    features, (wavs, lengths) = Features(), noise((3000, 2000, 500))
    wavs, lengths = wavs.to(DEVICE), lengths.to(DEVICE)
    together, _ = features(wavs, lengths)
    for i, n in enumerate(lengths):
        alone, frames = features(wavs[i : i + 1, :n], lengths[i : i + 1])
        assert torch.equal(together[i : i + 1, : frames[0]], alone)
        assert not together[i, frames[0] :].any()


@runs_kernels
def test_pieces_of_an_utterance():
    features, (wavs, lengths) = Features(top_db=None), noise((4000, 4000))
    wavs, lengths = wavs.to(DEVICE), lengths.to(DEVICE)
    whole, _ = features(wavs, lengths)
    state, found = features.initial_state(2).to(DEVICE), []
    for piece in wavs.split(1234, dim=1):
        frames, state = features.advance(piece, state)
        found.append(frames)
    found.append(features.advance(wavs[:, :0], state, final=True)[0])
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=0, atol=1e-4)


@runs_kernels
def test_a_wrong_sample_is_not_hidden():
    wavs, lengths = noise((4000, 4000))
    wavs[0, 2000] = float("nan")
    x, _ = Features()(wavs.to(DEVICE), lengths.to(DEVICE))
    assert x[0, 2000 // 160].isnan().all() and x[1].isfinite().all()


@runs_kernels
def test_silence_has_the_least_power():
    wavs, lengths = torch.zeros(2, 2000, device=DEVICE), torch.tensor([2000, 1000], device=DEVICE)
    x, frames = Features()(wavs, lengths)
    torch.testing.assert_close(x[0], torch.full_like(x[0], -100.0))
    assert not x[1, frames[1] :].any()


@runs_kernels
def test_the_choice(monkeypatch):
    wavs = torch.randn(2, 2000, device=DEVICE)
    assert log_mel.supports(wavs)
    assert not log_mel.supports(wavs.requires_grad_())
    monkeypatch.setenv("MAMBA_ASR_FEATURES_BACKEND", "torch")
    assert not log_mel.supports(wavs.detach())
