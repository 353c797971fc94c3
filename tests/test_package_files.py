"""What a packaged model refuses: audio it cannot use, damaged files, classes nobody listed."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch

from inference import Recognizer
from modules.errors import UserError
from tests.recipes import runs
from tests.recipes.packages import trained


@pytest.fixture(scope="module")
def ctc():
    """(training's output folder, package)."""
    return trained("ctc")


@pytest.fixture(scope="module")
def s2s():
    return trained("s2s")


@pytest.fixture
def copied(ctc, tmp_path):
    """A copy of a package that can be damaged."""
    return shutil.copytree(ctc[1], tmp_path / "copy")


# ---- Audio ----


def test_any_rate_channels_and_type(ctc, tmp_path):
    recognizer = Recognizer.from_folder(ctc[1], device="cpu")
    text = "ABE BEAD CAB"
    samples = runs.speak(text).astype(np.float32)
    expected = recognizer.transcribe(samples, sample_rate=16000)
    assert expected.duration == pytest.approx(0.12 * len(text))
    sf.write(tmp_path / "stereo.wav", np.stack([1.5 * samples, 0.5 * samples], 1), 16000, "FLOAT")
    assert recognizer.transcribe(tmp_path / "stereo.wav") == expected
    assert recognizer.transcribe(torch.from_numpy(samples), 16000) == expected
    integers = (samples * 2**15).astype(np.int16)
    exact = recognizer.transcribe(integers.astype(np.float32) / 2**15, 16000)
    assert recognizer.transcribe(integers, 16000) == exact
    for rate in (8000, 44100):
        time = np.arange(int(rate * expected.duration)) / rate
        other = np.interp(time, np.arange(len(samples)) / 16000, samples)
        assert recognizer.transcribe(other, rate).duration == pytest.approx(
            expected.duration, abs=1e-3
        )
    assert recognizer.transcribe(np.zeros(1), 16000).duration == 1 / 16000


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        ("nothing.flac", None, "there is no file nothing.flac"),
        (__file__, None, "is no audio"),
        (np.zeros(16000), None, "give sample_rate=16000"),
        (np.zeros(16000), -1, "sample_rate=-1"),
        (np.zeros((2, 100)), 16000, r"\(2, 100\) is not one channel"),
        (np.zeros(0), 16000, "holds no samples"),
        (np.full(100, np.nan), 16000, "not finite"),
        (np.zeros(100, bool), 16000, "torch.bool is unknown"),
        (3, 16000, "type int"),
    ],
)
def test_audio_that_cannot_be_used(ctc, audio, rate, message):
    with pytest.raises(UserError, match=message):
        Recognizer.from_folder(ctc[1], device="cpu").transcribe(audio, rate)


# ---- Damage ----


def change_weights(folder, change):
    weights = torch.load(folder / "model.ckpt", weights_only=True)
    change(weights)
    torch.save(weights, folder / "model.ckpt")


def refused(folder, message):
    with pytest.raises(UserError, match=message):
        Recognizer.from_folder(folder, device="cpu")


def test_weights_that_do_not_fit_are_named(copied):
    change_weights(copied, lambda w: w.update({"encoder.more": torch.zeros(1)}))
    refused(copied, "unexpected weight 'encoder.more'")
    change_weights(copied, lambda w: (w.pop("encoder.more"), w.pop("ctc_head.bias")))
    refused(copied, "missing weight 'ctc_head.bias'")
    change_weights(copied, lambda w: w.update({"ctc_head.bias": torch.zeros(3)}))
    refused(copied, r"'ctc_head.bias' has shape \(3,\), config.json wants \(31,\)")


@pytest.mark.parametrize("name", ["model.ckpt", "normalizer.ckpt"])
@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_truncated_file(copied, name, size):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:size])
    refused(copied, rf"{name} \(\d+ bytes\) is damaged")


def test_missing_files(copied, ctc, s2s, tmp_path):
    refused(tmp_path / "nowhere", "there is no folder")
    refused(ctc[0], f"no package; make one of it: python package.py {ctc[0]} --output DIR")
    for name in ("normalizer.ckpt", "model.ckpt", "config.json"):
        (copied / name).rename(copied / "away")
        refused(copied, f"{name} is missing")
        (copied / "away").rename(copied / name)
    folder = shutil.copytree(s2s[1], tmp_path / "s2s")
    (folder / "tokenizer.ckpt").unlink()
    refused(folder, r"tokenizer.ckpt is missing")


def test_weights_that_would_run_code(copied, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"a": Evil()}, copied / "model.ckpt")
    refused(copied, r"model.ckpt holds posix.mkdir, which is no tensor")
    assert not (tmp_path / "evil").exists()


def test_a_configuration_names_listed_classes_only(copied):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    for name in ("os.system", "modules.launch.run"):
        config["parts"]["encoder"]["activation"] = {"factory": name}
        path.write_text(json.dumps(config))
        refused(copied, f"'{name}' is not a class that a package may name")
    config["parts"]["encoder"] = {"new": "modules.encoder.Encoder", "width": 3}
    path.write_text(json.dumps(config))
    refused(copied, "'encoder' cannot be made.*width")
    path.write_text(json.dumps(config | {"format": 99}))
    refused(copied, "has format 99")
    path.write_text("{")
    refused(copied, "config.json is damaged")
