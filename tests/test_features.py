"""Features' constants go to the waveforms' device once, and change nothing."""

import copy
import pickle
from functools import partial

import pytest
import torch
from speechbrain.lobes.features import Fbank

from modules.features import Features


def constants(features):
    stft, banks = features.fbank.compute_STFT, features.fbank.compute_fbanks
    return stft.window, banks.f_central, banks.band, banks.all_freqs_mat


def test_constants_are_where_the_waveforms_are(monkeypatch):
    features, lengths = Features(n_fft=512, top_db=None), torch.tensor([16000, 8000])
    # As decorated there, but for autocast, which knows no meta device.
    monkeypatch.setattr(
        features.fbank, "forward", partial(Fbank.forward.__wrapped__, features.fbank)
    )
    before = constants(features)
    features(torch.randn(2, 16000), lengths)
    assert all(a is b for a, b in zip(constants(features), before, strict=True))
    x, _ = features(torch.randn(2, 16000, device="meta"), lengths.to("meta"))
    assert x.shape == (2, 101, 80)
    assert all(constant.is_meta for constant in (x, *constants(features)))
    assert features.initial_state(2).is_meta


def test_the_window_goes_last(monkeypatch):
    """Another thread that finds it on the device finds the others there too."""
    features = Features(n_fft=512)
    stft, banks = features.fbank.compute_STFT, features.fbank.compute_fbanks
    seen = []

    def note(self, name, value):
        seen.append((name, stft.window.is_meta))
        torch.nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(type(banks), "__setattr__", note)
    monkeypatch.setattr(features.fbank, "forward", lambda wavs: wavs)
    features.mels(torch.randn(1, 1600, device="meta"))
    assert {("band", False), ("device_inp", False)} <= set(seen)
    assert not any(moved for _, moved in seen)


def test_copies_compute_the_same():
    features, wavs = Features(n_fft=512), torch.randn(2, 16000)
    lengths = torch.tensor([16000, 8000])
    expected, _ = features(wavs, lengths)
    for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(other(wavs, lengths)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
