"""stream.py: files, raw PCM and the microphone, as a user runs it."""

import io
import json
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import stream as script
from inference import sources
from inference.audio import resampled
from inference.transcript import Final, Partial
from modules.errors import UserError
from tests.recipes import runs
from tests.recipes.causal import causal_package, speech
from tests.recipes.packages import RATE, SENTENCES, said


@pytest.fixture(scope="module")
def causal():
    return causal_package()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A wav file of three sentences, and their texts."""
    x, texts = speech(3)
    path = tmp_path_factory.mktemp("audio") / "three.wav"
    sf.write(path, x, RATE)
    return path, texts


def raw(x):
    return (x * 32767).astype("<i2").tobytes()


def command(*arguments):
    return [sys.executable, str(runs.ROOT / "stream.py"), *map(str, arguments)]


def call(monkeypatch, capsys, *arguments, status=0):
    """stream.py in this process: what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["stream.py", *map(str, arguments)])
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == status
    return capsys.readouterr()


# ---- Processes ----


def test_a_file(causal, recording):
    path, texts = recording
    done = runs.run(command(path, "--model", causal, "--fast"))
    assert (done.returncode, done.stdout.splitlines()) == (0, texts)
    seconds = sf.info(path).duration
    assert re.match(rf"{seconds:.1f} s of audio, [\d.]+ s of compute: real-time f", done.stderr)
    chunks = int(seconds / 0.32)
    wanted = rf"{chunks} chunks of 320 ms, compute p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms"
    assert re.search(wanted, done.stderr)
    assert "Traceback" not in done.stderr


def test_raw_pcm_on_stdin(causal):
    x, texts = speech(2, gap=0.6)  # a pause too short to end a segment
    done = subprocess.run(
        command("-", "--model", causal),
        input=raw(x) + b"\0",
        capture_output=True,
        cwd=runs.ROOT,
        env=runs.environment(),
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.decode() == " ".join(texts) + "\n"


def test_results_come_while_audio_comes_and_ctrl_c_ends_the_stream(causal):
    x, texts = speech(1)
    process = subprocess.Popen(
        command("-", "--model", causal, "--format", "json"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=runs.ROOT,
        env=runs.environment(),
        preexec_fn=runs.heed_interrupts,
    )
    with process:
        process.stdin.write(raw(np.concatenate([x, said(SENTENCES[1], after=0.24)])))
        process.stdin.flush()
        seen = []
        while not seen or seen[-1]["type"] != "final":
            seen.append(json.loads(process.stdout.readline()))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        seen += map(json.loads, process.stdout.read().splitlines())
        errors = process.stderr.read().decode()
    assert process.returncode == 130
    finals = [s for s in seen if s["type"] == "final"]
    assert finals[0]["text"] == texts[0] and SENTENCES[1].startswith(finals[1]["text"])
    partials = [s for s in seen if s["type"] == "partial"]
    assert partials and texts[0].startswith(partials[0]["text"])
    assert "real-time factor" in errors and "Traceback" not in errors


# ---- Formats ----


def test_json_has_times(causal, recording, monkeypatch, capsys):
    path, texts = recording
    shown = call(monkeypatch, capsys, path, "--model", causal, "--fast", "--format", "json")
    lines = [json.loads(line) for line in shown.out.splitlines()]
    finals = [line for line in lines if line["type"] == "final"]
    assert [f["text"] for f in finals] == texts
    for line in lines:
        words = line["words"]
        assert set(line) == {"type", "text", "start", "end", "words"}
        assert line["start"] == words[0]["start"] <= words[-1]["end"] == line["end"]
        assert " ".join(w["text"] for w in words) == line["text"]
        assert set(words[0]) == {"text", "start", "end", "confidence"}
    starts = [f["start"] for f in finals]
    assert starts == sorted(starts) and starts[-1] > 4


def test_a_terminal_shows_what_may_change():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for out, partial in ((Terminal(), "\r\x1b[KCAB"), (io.StringIO(), "")):
        writer = script.TextWriter(out)
        writer.partial(Partial("CAB"))
        assert out.getvalue() == partial
        writer.final(Final("CAB", 0.0, 0.4))
        assert out.getvalue().removeprefix(partial).removeprefix("\r\x1b[K") == "CAB\n"
    terminal = Terminal()
    script.TextWriter(terminal).partial(Partial("CAB " * 200))
    assert len(terminal.getvalue()) < 300


# ---- Sources ----


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 44056])
def test_a_stream_is_resampled_as_a_whole(rate):
    x = torch.randn(rate // 3)
    (expected,) = resampled([x], rate, RATE)
    pieces = list(resampled(x.split(997), rate, RATE, seconds=0.02))
    assert len(pieces) > 5
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=0)


def test_a_file_of_another_rate(causal, recording, tmp_path, monkeypatch, capsys):
    path, texts = recording
    x = torch.from_numpy(sf.read(path, dtype="float32")[0])
    y = torch.cat(list(resampled([x], RATE, 44100))).numpy()
    sf.write(tmp_path / "a.flac", np.stack([y, y], 1), 44100)
    shown = call(monkeypatch, capsys, tmp_path / "a.flac", "--model", causal, "--fast")
    assert shown.out.splitlines() == texts


def test_a_file_takes_as_long_as_it_sounds(recording, monkeypatch):
    clock, sleeps = [100.0], []

    def sleep(seconds):
        sleeps.append(seconds)
        clock[0] += seconds

    fake = types.SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr(sources, "time", fake)
    heard = 0
    for block in sources.file(recording[0]).at(RATE):
        heard += len(block)
        assert clock[0] - 100 == pytest.approx(heard / RATE)
        clock[0] += 0.01  # compute hides in the waiting
    assert heard == sf.info(recording[0]).frames
    assert max(sleeps) <= sources.PACKET
    sleeps.clear()
    assert sum(map(len, sources.file(recording[0], fast=True).at(RATE))) == heard
    assert not sleeps


class Microphone:
    """Stands for the package sounddevice, with a microphone that knows one rate."""

    class PortAudioError(Exception):
        pass

    def __init__(self, x, rate):
        self.x, self.rate = x, rate

    def check_input_settings(self, samplerate, **_):
        if samplerate != self.rate:
            raise self.PortAudioError("Invalid sample rate")

    def query_devices(self, device, kind):
        if device == "none":
            raise ValueError("No input device matching 'none'")
        return {"default_samplerate": float(self.rate)}

    def InputStream(self, samplerate, blocksize, callback, **_):  # noqa: N802 - sounddevice's
        class Stream:
            def __enter__(stream):  # noqa: N805
                for i in range(0, len(self.x), blocksize):
                    status = types.SimpleNamespace(input_overflow=i == 0)
                    callback(self.x[i : i + blocksize, None], blocksize, None, status)

            def __exit__(stream, *_):  # noqa: N805
                pass

        return Stream()


class UntilCtrlC:
    """A queue that is interrupted when it is empty."""

    def __init__(self):
        self.items = []

    def put(self, item):
        self.items.append(item)

    def get(self):
        if not self.items:
            raise KeyboardInterrupt
        return self.items.pop(0)


@pytest.mark.parametrize("rate", [RATE, 48000])
def test_the_microphone(rate, causal, monkeypatch, capsys):
    x, texts = speech(2)
    x = torch.cat(list(resampled([torch.from_numpy(x)], RATE, rate))).numpy()
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(x, rate))
    monkeypatch.setattr(sources.queue, "SimpleQueue", UntilCtrlC)
    shown = call(monkeypatch, capsys, "--microphone", "--model", causal)
    assert shown.out.splitlines() == texts
    assert shown.err.count("warning: the microphone lost samples") == 1
    assert "real-time factor" in shown.err
    options = ["--microphone", "--input", "none", "--model", causal, "--rate", 8000]
    shown = call(monkeypatch, capsys, *options, status=2)
    assert "cannot be used (No input device matching 'none')" in shown.err


# ---- A user's mistakes ----


def test_mistakes_are_told(causal, recording, tmp_path, monkeypatch, capsys):
    path, _ = recording
    (tmp_path / "text.wav").write_text("no sound" * 100)
    for message, *arguments in (
        ("give one of FILE, - and --microphone",),
        ("give one of FILE, - and --microphone", path, "--microphone"),
        ("--fast: only a file", "-", "--fast"),
        ("--rate: a file tells its own", path, "--rate", 16000),
        ("--input chooses a microphone", path, "--input", "USB"),
        ("'0' must be a whole number", path, "--threads", 0),
        ("'99999' must be 1 to 1024", path, "--threads", 99999),
        ("--rate 16 is no rate of speech", "-", "--rate", 16),
        ("there is no file", tmp_path / "none.wav"),
        ("is no audio", tmp_path / "text.wav"),
        ("chunk_seconds=0.001 is shorter", path, "--chunk-seconds", 0.001),
        ("chunk_seconds=1000000000.0 is", path, "--chunk-seconds", 1e9),
        ("endpoint_seconds=-1.0 is no pause", path, "--endpoint-seconds", -1),
        ("'inf' must be a number", path, "--endpoint-seconds", "inf"),
        ("there is no folder nowhere", path, "--model", "nowhere"),
    ):
        shown = call(monkeypatch, capsys, "--model", causal, *arguments, status=2)
        assert message in shown.err and shown.out == ""


def test_the_microphone_needs_its_packages(causal, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    shown = call(monkeypatch, capsys, "--microphone", "--model", causal, status=2)
    assert "pip install sounddevice" in shown.err


def test_a_file_on_stdin_is_no_raw_pcm(causal, recording, monkeypatch, capsys):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(recording[0].read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    shown = call(monkeypatch, capsys, "-", "--model", causal, status=1)
    assert "stdin is no raw PCM" in shown.err and shown.out == ""


class Trickle(io.BytesIO):
    """Gives a byte, then two, and so on: a pipe whose writer is slow."""

    given = 0

    def read1(self, size=-1):
        self.given += 1
        return self.read(min(size, self.given))


@pytest.mark.parametrize("rate", [RATE, 24000, 32000, 44100])
def test_an_mp3_without_a_tag_is_no_raw_pcm(rate, tmp_path):
    x = np.random.default_rng(0).normal(0, 0.1, rate)
    sf.write(tmp_path / "a.mp3", x, rate)
    data = (tmp_path / "a.mp3").read_bytes()
    assert data[0] == 0xFF and data[1] in (0xF2, 0xF3, 0xFA, 0xFB)
    refused(data)


@pytest.mark.parametrize(
    ("name", "codec", "size"), [("a.mp4", "aac", 1024), ("a.webm", "libopus", 960)]
)
def test_what_pyav_reads_is_no_raw_pcm(name, codec, size, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, size), np.float32), "fltp", "mono")
        frame.rate, frame.pts = 48000, 0
        form = stream.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout="mono", rate=48000)
        for part in [*resampler.resample(frame), None]:
            container.mux(stream.encode(part))
    refused((tmp_path / name).read_bytes())


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "aiff", "caf"])
def test_what_soundfile_reads_is_no_raw_pcm(kind, tmp_path):
    sf.write(tmp_path / f"a.{kind}", np.zeros(RATE), RATE)
    refused((tmp_path / f"a.{kind}").read_bytes())


def refused(data):
    for stream in (io.BytesIO(data), Trickle(data)):
        with pytest.raises(UserError, match="stdin is no raw PCM"):
            list(sources.pcm(stream, RATE).blocks())


def test_samples_that_resemble_a_file_are_heard():
    sound = raw(np.random.default_rng(0).normal(0, 0.1, RATE))
    header = bytes.fromhex("fff388c4")  # of an mp3 frame, and nothing like it after that
    for data in (header + sound, sound[:1500] + b"RIFF" + sound, sound[:8192] + b"ID3 " + sound):
        for stream in (io.BytesIO(data), Trickle(data)):
            heard = torch.cat(list(sources.pcm(stream, RATE).blocks()))
            assert (heard * 2**15).short().numpy().tobytes() == data


@pytest.mark.parametrize("content", [b"", b"\0"])
def test_nothing_on_stdin_is_told(content, causal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    shown = call(monkeypatch, capsys, "-", "--model", causal, status=1)
    assert "error: stdin holds no samples" in shown.err and shown.out == ""


def test_a_file_without_samples_is_told(causal, tmp_path, monkeypatch, capsys):
    sf.write(tmp_path / "a.wav", np.zeros(0), RATE)
    shown = call(monkeypatch, capsys, tmp_path / "a.wav", "--model", causal, status=1)
    assert f"error: {tmp_path / 'a.wav'} holds no samples" in shown.err and shown.out == ""


def test_stdin_that_is_closed(causal):
    done = runs.run(["bash", "-c", f"exec {sys.executable} stream.py - --model {causal} <&-"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: -: stdin is closed;") and done.stderr.count("\n") == 1


def test_help_teaches(monkeypatch, capsys):
    shown = call(monkeypatch, capsys, "--help").out
    for wanted in ("examples:", "arecord", "--fast", "exit status", "conmamba_causal_small.yaml"):
        assert wanted in shown


# ---- The benchmark ----


def test_the_benchmark_measures_every_row():
    options = ["--size=tiny", "--hours=0.001", "--threads", "1", "--chunks", "0.16", "0.32"]
    options += ["--model", "chunked"]
    done = runs.run([sys.executable, "benchmarks/streaming.py", *options])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == "streaming"
    assert [row["chunk_ms"] for row in report["rows"]] == [160, 320]
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["longest_ms"]
        assert row["share"] == pytest.approx(row["p99_ms"] / row["chunk_ms"], rel=0.01)
