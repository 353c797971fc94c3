"""Files of all kinds give the same sound, block by block as at once."""

from fractions import Fraction

import numpy as np
import pytest
import soundfile as sf
import torch
from torchaudio.functional import resample

from inference.audio import BLOCK, open_audio, read, resampled
from modules.errors import UserError

RATE = 16000


def sweep(rate, seconds):
    """A tone that rises from 200 to 2000 Hz."""
    time = np.arange(int(rate * seconds)) / rate
    return 0.4 * np.sin(2 * np.pi * (200 * time + 900 * time**2 / seconds))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("block", [1000, 44100 * 7])
def test_blocks_resample_as_a_whole(rate, block):
    x = torch.from_numpy(sweep(rate, 2.3 * BLOCK).astype(np.float32))
    found = list(resampled(iter(x.split(block)), rate, RATE))
    assert rate == RATE or max(map(len, found)) <= 2 * BLOCK * RATE
    expected = x if rate == RATE else resample(x, rate, RATE)
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-6, rtol=0)


def test_a_rate_that_shares_no_factor():
    x = torch.from_numpy(sweep(44101, 3).astype(np.float32))
    y = torch.cat(list(resampled(iter([x]), 44101, RATE)))
    assert len(y) == pytest.approx(3 * RATE, abs=2)
    expected = torch.from_numpy(sweep(RATE, 3).astype(np.float32))
    torch.testing.assert_close(y[100 : 3 * RATE - 100], expected[100:-100], atol=0.08, rtol=0)


def whole(path):
    recording = open_audio(path)
    return torch.cat(list(read(recording, RATE))), recording


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.flac", {}),
        ("a.mp3", {}),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("A.WAV", {"format": "WAV", "subtype": "ULAW"}),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_kinds_that_soundfile_reads(name, options, channels, tmp_path):
    x = sweep(48000, 2)
    scales = [1.0] if channels == 1 else [1.5, 0.5]
    sf.write(tmp_path / name, np.stack([s * x for s in scales], 1), 48000, **options)
    same_sound(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "codec", "size"),
    [("a.m4a", "aac", 1024), ("a.mp4", "aac", 1024), ("a.webm", "libopus", 960)],
)
def test_kinds_that_pyav_reads(name, codec, size, tmp_path):
    av = pytest.importorskip("av")
    x = sweep(48000, 2)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(
            np.stack([1.5 * x, 0.5 * x]).astype(np.float32), format="fltp", layout="stereo"
        )
        frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        form = stream.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout="stereo", rate=48000, frame_size=size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    same_sound(tmp_path / name)


def same_sound(path):
    """It is the sweep, a few ms off and a little changed by its codec."""
    y, recording = whole(path)
    assert recording.rate == 48000
    assert recording.seconds == pytest.approx(2, abs=0.1)
    expected = sweep(RATE, 2)
    y = np.pad(y.numpy(), (0, RATE // 2))
    best = max(np.corrcoef(y[d : d + len(expected)], expected)[0, 1] for d in range(0, RATE // 10))
    assert best > 0.98
    assert np.square(y).sum() == pytest.approx(np.square(expected).sum(), rel=0.1)


def test_without_pyav_the_remedy_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"nothing" * 100)
    monkeypatch.setattr("inference.decode.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install av"):
        open_audio(tmp_path / "a.m4a")


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "fake.mp3").write_text("hello" * 100)
    (tmp_path / "x.raw").write_text("hello" * 100)
    for name, message in (
        ("none.wav", "there is no file"),
        (".", "there is no file"),
        ("empty.wav", "is empty"),
        ("fake.mp3", "is no audio"),
        ("x.raw", "(is|holds) no audio"),
    ):
        with pytest.raises(UserError, match=message):
            open_audio(tmp_path / name)
    sf.write(tmp_path / "a.flac", sweep(RATE, 20), RATE)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.flac is damaged"):
        whole(tmp_path / "cut.flac")
    sf.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(UserError, match="holds no samples"):
        whole(tmp_path / "none.wav")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp3\n#EXT-X-ENDLIST\n"),
        ("list.txt", "ffconcat version 1.0\nfile other.mp3\n"),
    ],
)
def test_a_playlist_opens_no_other_file(name, text, tmp_path):
    pytest.importorskip("av")
    sf.write(tmp_path / "other.mp3", np.zeros(16000), 16000)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is no audio"):
        open_audio(tmp_path / name)
