"""POST /v1/audio/transcriptions, judged by the OpenAI client and by other people's parsers."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile as sf
import srt
import torch
import webvtt

from inference import Recognizer
from inference.audio import resampled
from tests.recipes.causal import PAUSE, causal_package
from tests.recipes.packages import RATE, SENTENCES, said
from tests.server import servers
from tests.server.servers import get, metric, post, served, shared, until


@pytest.fixture(scope="module")
def server():
    return shared()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def recording(x, kind="wav", rate=RATE):
    """A file as the OpenAI client sends it."""
    file = io.BytesIO()
    sf.write(file, x, rate, format=kind.upper())
    return f"speech.{kind}", file.getvalue()


@pytest.fixture(scope="module")
def long():
    """Four sentences with pauses, longer than a window, and their texts."""
    texts = [SENTENCES[i] for i in (0, 1, 2, 5)]
    x = np.concatenate([said(t, after=PAUSE, seed=i) for i, t in enumerate(texts)])
    return recording(x, "flac"), texts


def transcribe(client, file, **options):
    return client.audio.transcriptions.create(model="whisper-1", file=file, **options)


# ---- Formats ----


def test_json_and_text(client, server):
    file = recording(said(SENTENCES[0]))
    found = transcribe(client, file)
    assert (found.text, found.usage.type, found.usage.seconds) == (SENTENCES[0], "duration", 2)
    assert transcribe(client, file, response_format="text") == f"{SENTENCES[0]}\n"
    assert [m.id for m in client.models.list()] == [causal_package().name]


def test_verbose_json(client, long, tmp_path):
    file, texts = long
    (tmp_path / file[0]).write_bytes(file[1])
    expected = Recognizer.from_folder(causal_package(), "cpu").transcribe(tmp_path / file[0])
    found = transcribe(client, file, response_format="verbose_json", language="en")
    assert found.text == " ".join(texts) == expected.text
    assert (found.language, found.words) == ("en", None)
    assert found.duration == pytest.approx(expected.duration, abs=1e-3)
    assert [s.text for s in found.segments] == texts
    for i, (segment, wanted) in enumerate(zip(found.segments, expected.segments, strict=True)):
        assert segment.id == i
        assert segment.start == pytest.approx(wanted.start, abs=0.05)
        assert segment.end == pytest.approx(wanted.end, abs=0.05)
        assert -1 < segment.avg_logprob <= 0


def test_words(client, long):
    file, texts = long
    options = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
    found = transcribe(client, file, **options)
    assert [w.word for w in found.words] == " ".join(texts).split()
    assert all(a.end <= b.start for a, b in zip(found.words, found.words[1:], strict=False))
    assert found.segments is None
    both = transcribe(client, file, **options | {"timestamp_granularities": ["word", "segment"]})
    assert both.words == found.words and len(both.segments) == len(texts)


def test_subtitles(client, long):
    file, texts = long
    segments = transcribe(client, file, response_format="verbose_json").segments
    times = [(s.start, s.end) for s in segments]
    cues = list(srt.parse(transcribe(client, file, response_format="srt"), ignore_errors=False))
    assert [c.content for c in cues] == texts
    assert [(c.start.total_seconds(), c.end.total_seconds()) for c in cues] == times
    text = transcribe(client, file, response_format="vtt")
    cues = list(webvtt.from_string(text))
    assert [c.text for c in cues] == texts
    assert [(c.start_in_seconds, c.end_in_seconds) for c in cues] == pytest.approx(
        [(int(a), int(b)) for a, b in times], abs=1
    )


@pytest.mark.parametrize("kind", ["flac", "mp3", "ogg"])
def test_kinds_of_files(client, kind):
    assert transcribe(client, recording(said(SENTENCES[1]), kind)).text == SENTENCES[1]


def test_other_rates_channels_and_containers(client, tmp_path):
    av = pytest.importorskip("av")
    x = said(SENTENCES[2])
    y = torch.cat(list(resampled([torch.from_numpy(x)], RATE, 44100))).numpy()
    assert transcribe(client, recording(np.stack([y, y], 1), rate=44100)).text == SENTENCES[2]
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(x[None], format="fltp", layout="mono")
        frame.rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert transcribe(client, (path.name, path.read_bytes())).text == SENTENCES[2]


# ---- Many clients ----


def test_each_of_32_clients_gets_its_own_text(client, server):
    texts = [f"{SENTENCES[i % 6]} {SENTENCES[i // 6]}" for i in range(32)]
    files = [recording(said(t, seed=i), "flac") for i, t in enumerate(texts)]
    before = [metric(server.url, f"batch_windows_{k}") for k in ("sum", "count")]
    with ThreadPoolExecutor(32) as clients:
        found = list(clients.map(lambda f: transcribe(client, f).text, files))
    assert found == texts
    after = [metric(server.url, f"batch_windows_{k}") for k in ("sum", "count")]
    windows, batches = (b - a for a, b in zip(before, after, strict=True))
    assert batches <= windows / 2  # they were computed together
    until(lambda: metric(server.url, "queue") == 0 and not server.left())


def test_one_that_fails_spoils_no_other(monkeypatch):
    whole = servers.recognizer().words

    def words(signals):
        if any(len(s) > 3 * RATE for s in signals):
            raise RuntimeError("this one cannot be computed")
        return whole(signals)

    monkeypatch.setattr(servers.recognizer(), "words", words)
    contents = [
        recording(said(t, after=a))[1] for t, a in zip(SENTENCES, (0, 2.5, 0), strict=False)
    ]
    with served() as service, ThreadPoolExecutor(3) as clients:
        service.recognizer.whole_seconds = 10
        found = list(clients.map(lambda c: post(service.url, c), contents))
    assert [f[0] for f in found] == [200, 500, 200]
    assert found[0][2]["text"] == SENTENCES[0] and found[2][2]["text"] == SENTENCES[2]


# ---- Refused ----


def test_mistakes_are_explained(client, server):
    file = recording(said(SENTENCES[0]))
    for options, message in (
        ({"response_format": "docx"}, "response_format='docx' is unknown"),
        ({"timestamp_granularities": ["word"]}, "give response_format=verbose_json"),
        (
            {"response_format": "srt", "timestamp_granularities": ["letter"]},
            "give word, segment or both",
        ),
        ({"stream": True, "response_format": "text"}, "text comes in one piece"),
    ):
        with pytest.raises(openai.BadRequestError, match="give") as error:
            transcribe(client, file, **options)
        assert message in error.value.message
    code, _, _ = get(f"{server.url}/v1/audio/transcriptions")
    assert code == 405
    code, _, body = post(server.url, b"", name="")
    assert code in (400, 422) and body["error"]["message"]


def test_what_is_no_audio(client, server):
    with pytest.raises(openai.APIStatusError) as error:
        transcribe(client, ("notes.wav", b"no sound" * 100))
    assert error.value.status_code == 415
    assert "notes.wav is no audio" in error.value.message
    assert str(server.temporary) not in error.value.message
    whole = recording(said(SENTENCES[0]), "flac")[1]
    with pytest.raises(openai.APIStatusError) as error:
        transcribe(client, ("half.flac", whole[: len(whole) // 2]))
    assert error.value.status_code == 415 and "half.flac is damaged" in error.value.message
    until(lambda: not server.left())


@pytest.mark.parametrize("content", [b"", recording(np.zeros(0))[1]], ids=["bytes", "samples"])
def test_what_is_empty(client, content):
    with pytest.raises(openai.UnprocessableEntityError, match=r"empty"):
        transcribe(client, ("empty.wav", content))


# ---- State ----


def test_state_and_metrics(server, client):
    assert json.loads(get(f"{server.url}/health")[2]) == {"status": "alive"}
    state = json.loads(get(f"{server.url}/ready")[2])
    assert state == {
        "ready": True,
        "model": causal_package().name,
        "sample_rate": RATE,
        "streaming": True,
        "key": False,
    }
    names = ['requests_total{status="200"}', 'audio_seconds_total{source="file"}']
    names += ["real_time_factor_count", "real_time_factor_sum", "request_seconds_count"]
    before = [metric(server.url, n) for n in names]
    transcribe(client, recording(said(SENTENCES[0])))
    after = [metric(server.url, n) for n in names]
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert grown[:3] == pytest.approx([1, 1.44, 1]) and grown[3] > 0 and grown[4] == 1
    assert metric(server.url, "ready") == 1
    assert "/v1/audio/transcriptions" in json.loads(get(f"{server.url}/openapi.json")[2])["paths"]


def test_nothing_that_was_said_is_logged(server, client):
    transcribe(client, recording(said(SENTENCES[5])))
    assert "transcription 200" in server.log()
    assert not any(word in server.log() for t in SENTENCES for word in t.split())
    assert "speech.wav" not in server.log() and "Traceback" not in server.log()
