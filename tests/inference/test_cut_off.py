"""A file that ends before its sound does is an error, never a shorter recording."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import soundfile as sf
import torch

from inference.audio import open_audio, read
from modules.cut_off import cut_off
from modules.errors import UserError

RATE = 16000
SECONDS = 6
KINDS = {
    "a.wav": {"subtype": "PCM_24"},
    "f.wav": {"subtype": "FLOAT"},
    "rf64.wav": {"format": "RF64"},
    "a.flac": {},
    "a.mp3": {},
    "a.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.aiff": {},
    "a.au": {},
    "a.caf": {},
    "a.w64": {},
}


def sound():
    """Speech-like: noise with pauses, which bit rates follow."""
    x = 0.2 * np.random.default_rng(0).standard_normal(RATE * SECONDS)
    x[RATE : 3 * RATE] *= 1e-4
    return x


def samples(path):
    return sum(map(len, read(open_audio(path), RATE)))


def cut(path, size):
    """A file of the first bytes of another."""
    target = path.with_name(f"cut-{path.name}")
    target.write_bytes(path.read_bytes()[:size])
    return target


@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_soundfile_reads(name, tmp_path):
    path = tmp_path / name
    sf.write(path, sound(), RATE, **KINDS[name])
    assert samples(path) == pytest.approx(RATE * SECONDS, abs=RATE / 10)
    size = path.stat().st_size
    # A few bytes, a random place, a block of a disk, the half.
    for left in (size - 1, size - 1234, 4096 * (size // 4096), size // 2):
        with pytest.raises(UserError, match=r"is (cut off|damaged)"):
            samples(cut(path, left))


def packed(path, codec, size, options):
    """Write the sound by PyAV."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        x = np.repeat(sound(), 3).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(x, format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        form = stream.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout="mono", rate=48000, frame_size=size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.webm", "libopus", {"live": "1"}),
    ],
)
def test_what_does_not_tell_its_length_is_read_to_its_end(name, codec, options, tmp_path):
    """As browsers and phones record it."""
    packed(tmp_path / name, codec, 960 if codec == "libopus" else 1024, options)
    assert samples(tmp_path / name) == pytest.approx(RATE * SECONDS, abs=RATE / 10)


@pytest.mark.parametrize(
    ("name", "codec", "size"), [("a.m4a", "aac", 1024), ("a.webm", "libopus", 960)]
)
def test_kinds_that_pyav_reads(name, codec, size, tmp_path):
    path = tmp_path / name
    packed(path, codec, size, {"movflags": "faststart"} if name == "a.m4a" else {})
    assert samples(path) == pytest.approx(RATE * SECONDS, abs=RATE / 10)
    for part in (0.8, 0.5):
        with pytest.raises(UserError, match=r"is (cut off|damaged)"):
            samples(cut(path, int(part * path.stat().st_size)))


def test_a_wav_written_to_a_pipe_is_read_to_its_end(tmp_path):
    sf.write(tmp_path / "a.wav", sound(), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data[4:8] = data[40:44] = struct.pack("<I", size)
        (tmp_path / "a.wav").write_bytes(data)
        assert samples(tmp_path / "a.wav") == RATE * SECONDS
        assert "length open" in cut_off(tmp_path / "a.wav", streamed=False)


def test_an_mp3_of_variable_rate_without_its_length(tmp_path, monkeypatch):
    """libsndfile guesses the length from the first frames and stops there."""
    path = tmp_path / "a.mp3"
    x = np.concatenate([sound()[RATE : 2 * RATE], sound()])
    sf.write(path, x, RATE, bitrate_mode="VARIABLE")
    data = path.read_bytes()
    first = next(i for i in range(4, len(data)) if data[i : i + 2] == data[:2])
    assert b"Xing" in data[:first]
    path.write_bytes(data[first:])
    short = sf.info(path).frames
    assert short < 0.8 * len(x) or short > 1.2 * len(x)
    if short < len(x):
        assert "can be read" in cut_off(path, short)
        pytest.importorskip("av")
        assert samples(path) == pytest.approx(len(x), abs=RATE / 10)
        monkeypatch.setattr("inference.decode.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install av"):
            samples(path)


@pytest.mark.parametrize(("rate", "channels"), [(1 << 30, 1), (50, 1), (16000, 1000)])
def test_a_header_that_asks_for_too_much(rate, channels, tmp_path):
    sf.write(tmp_path / "a.wav", torch.zeros(1000).numpy(), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[22:28] = struct.pack("<HI", channels, rate)
    data[32:34] = struct.pack("<H", 2 * channels)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(UserError, match=r"samples a second|no audio"):
        samples(tmp_path / "a.wav")
