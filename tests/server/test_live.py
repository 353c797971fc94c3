"""WS /v1/stream by the websockets client: text while audio comes, and why a connection ends."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from inference import Recognizer, StreamingRecognizer
from inference.audio import resampled
from inference.server.limits import Limits
from modules.errors import UserError
from tests.recipes import agreement
from tests.recipes.causal import chunked_package, speech
from tests.recipes.packages import RATE
from tests.server import servers
from tests.server.servers import metric, served, shared, until


def opened(url, **headers):
    return connect(f"{url.replace('http', 'ws')}/v1/stream", additional_headers=headers, proxy=None)


def start(socket, **fields):
    socket.send(json.dumps({"type": "start", **fields}))
    return json.loads(socket.recv(timeout=servers.WAIT))


def raw(x):
    return (np.asarray(x) * 32767).astype("<i2").tobytes()


def rest(socket):
    """Messages up to the end, and the closing code and reason."""
    found = []
    try:
        while True:
            found.append(json.loads(socket.recv(timeout=servers.WAIT)))
    except ConnectionClosed as closed:
        return found, closed.rcvd.code, closed.rcvd.reason


def stream(url, data, packet=3200, **fields):
    """The messages about a recording that is sent as fast as it goes."""
    with opened(url) as socket:
        ready = start(socket, **fields)
        assert ready["type"] == "ready"
        for i in range(0, len(data), packet):
            socket.send(data[i : i + packet])
        socket.send(json.dumps({"type": "finish"}))
        found, code, _ = rest(socket)
    assert code == 1000
    return found


def finals(messages):
    return [m["text"] for m in messages if m["type"] == "final"]


@pytest.mark.parametrize("packet", [320, 100_000])
def test_the_results_are_those_of_the_recogniser(packet):
    x, texts = speech(3)
    found = stream(shared().url, raw(x), packet)
    assert finals(found) == texts
    assert found[-1] == {"type": "done", "duration": pytest.approx(len(x) / RATE, abs=1e-3)}
    expected = StreamingRecognizer(servers.recognizer())
    segments = expected.push(torch.frombuffer(bytearray(raw(x)), dtype=torch.int16)).finals
    for message, segment in zip([m for m in found if m["type"] == "final"], segments, strict=False):
        assert message["start"] == pytest.approx(segment.start, abs=1e-3)
        assert [w["text"] for w in message["words"]] == [w.text for w in segment.words]
        assert set(message["words"][0]) == {"text", "start", "end", "confidence"}
    partials = [m["text"] for m in found if m["type"] == "partial"]
    assert packet > 3200 or (partials and texts[0].startswith(partials[0]))


def test_floats_of_another_rate():
    x, texts = speech(2)
    y = torch.cat(list(resampled([torch.from_numpy(x)], RATE, 48000))).numpy()
    found = stream(shared().url, y.astype("<f4").tobytes(), sample_rate=48000, format="f32le")
    assert " ".join(finals(found)) == " ".join(texts)
    assert found[-1]["duration"] == pytest.approx(len(x) / RATE, abs=0.01)


def test_a_chunked_model_hears_what_one_pass_in_its_chunks_hears():
    chunked = Recognizer.from_folder(chunked_package(), "cpu")
    x, texts = speech(4, gap=0.6)
    pcm = raw(x)
    heard = torch.frombuffer(bytearray(pcm), dtype=torch.int16).float() / 2**15
    expected = StreamingRecognizer(chunked, endpoint_seconds=None)
    expected.push(heard)
    text = expected.finish().text
    assert text == agreement.one_pass(chunked, heard) == " ".join(texts)
    with served(chunked) as service:
        for packet in (320, 7777 * 2, len(pcm)):
            found = finals(stream(service.url, pcm, packet, endpoint_seconds=0))
            assert found == [text]
        with opened(service.url) as socket:
            ready = start(socket)
        assert ready["chunk_seconds"] == pytest.approx(8 * 0.04)
        assert ready["lookahead_seconds"] > 2 * 0.04


def test_a_pause_ends_a_segment_when_the_client_says_so():
    x, texts = speech(3)
    assert finals(stream(shared().url, raw(x), endpoint_seconds=0)) == [" ".join(texts)]
    assert finals(stream(shared().url, raw(x), endpoint_seconds=0.8)) == texts


def test_text_comes_while_audio_comes():
    x, texts = speech(1)
    with opened(shared().url) as socket:
        assert start(socket)["chunk_seconds"] == pytest.approx(0.32)
        socket.send(raw(x))
        kinds = []
        while not kinds or kinds[-1]["type"] != "final":
            kinds.append(json.loads(socket.recv(timeout=servers.WAIT)))
        assert kinds[-1]["text"] == texts[0]
    until(lambda: metric(shared().url, "streams") == 0)  # it left without a finish


def test_each_of_many_streams_hears_its_own():
    before = metric(shared().url, 'audio_seconds_total{source="stream"}')
    sounds = [speech(n + 1) for n in range(4)]
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda s: finals(stream(shared().url, raw(s[0]))), sounds))
    assert found == [s[1] for s in sounds]
    seconds = sum(len(s[0]) for s in sounds) / RATE
    after = metric(shared().url, 'audio_seconds_total{source="stream"}')
    assert after - before == pytest.approx(seconds, abs=0.1)


# ---- Why a connection ends ----


def test_a_model_that_cannot_stream(monkeypatch):
    monkeypatch.setattr(servers.recognizer().normalize, "norm_type", "sentence")
    with served() as service, opened(service.url) as socket:
        assert start(socket)["message"].startswith("this model normalises features with norm_type")
        _, code, reason = rest(socket)
        assert code == 1003
        assert reason.startswith("this model normalises features") and len(reason) <= 123


@pytest.mark.parametrize(
    ("messages", "code", "reason"),
    [
        ([b"\0\0"], 1007, "the first message is no"),
        (["{"], 1007, "the first message is no"),
        (["[" * 200_000], 1007, "the first message is no"),
        (['{"type": "start", "endpoint_seconds": 1%s}' % ("0" * 400)], 1007, "endpoint_seconds=1"),
        (['{"type": "start"}', "[" * 200_000], 1007, "send samples in binary messages"),
        (['{"type": "start", "sample_rate": 16}'], 1007, "sample_rate=16 is no rate of speech"),
        (['{"type": "start", "sample_rate": "x"}'], 1007, "sample_rate='x' is no rate of speech"),
        (['{"type": "start", "sample_rate": "\\ud800"}'], 1007, r"sample_rate='\ud800' is no rate"),
        (['{"type": "start", "format": "mp3"}'], 1007, "format='mp3' is unknown"),
        (['{"type": "start", "format": ["s16le"]}'], 1007, "format=['s16le'] is unknown"),
        (['{"type": "start", "endpoint_seconds": -1}'], 1007, "endpoint_seconds=-1 is no pause"),
        (['{"type": "start", "endpoint_seconds": NaN}'], 1007, "endpoint_seconds=nan is no pause"),
        (['{"type": "start"}', b"\0"], 1007, "1 bytes are no whole number of s16le samples"),
        (['{"type": "start"}', '{"type": "end"}'], 1007, "send samples in binary messages"),
        (['{"type": "start"}', "[]"], 1007, "send samples in binary messages"),
        (
            ['{"type": "start", "format": "f32le"}', np.float32([np.nan] * 9999).tobytes()],
            1007,
            "the samples are not finite",
        ),
    ],
)
def test_mistakes_are_explained(messages, code, reason):
    with opened(shared().url) as socket:
        for message in messages:
            socket.send(message)
        found = rest(socket)
    assert found[0][-1]["type"] == "error"
    assert found[1] == code and found[2].startswith(reason)
    assert "Traceback" not in shared().log()


def test_a_model_that_fails(monkeypatch):
    def advance(*_):
        raise RuntimeError("out of order")

    with served() as service, opened(service.url) as socket:
        assert start(socket)["type"] == "ready"
        monkeypatch.setattr("inference.streaming_ctc.StreamingCTC.advance", advance)
        socket.send(bytes(2 * RATE))
        assert rest(socket)[1:] == (1011, "the model failed; the server's log tells how")


def test_an_end_is_told_whatever_its_message_holds(monkeypatch):
    def samples(*_):
        raise UserError("half a character, \ud800")

    monkeypatch.setattr("inference.server.streams.samples", samples)
    with served() as service, opened(service.url) as socket:
        assert start(socket)["type"] == "ready"
        socket.send(bytes(2))
        assert rest(socket)[1:] == (1007, r"half a character, \ud800")


def test_places_keys_and_patience():
    limits = Limits(streams=1, idle=1.0)
    with served(limits=limits, api_key="secret") as service:
        with opened(service.url) as socket:
            start(socket, api_key="wrong")
            assert rest(socket)[1:] == (
                1008,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
            )
        with opened(service.url, Authorization="Bearer secret") as socket:
            assert start(socket)["type"] == "ready"
            with opened(service.url) as other:
                start(other, api_key="secret")
                assert rest(other)[1:] == (1013, "all 1 places are taken; try again")
            assert rest(socket)[1:] == (1008, "nothing came for 1 s")
        until(lambda: service.open["streams"] == 0)
        with opened(service.url) as socket:
            assert start(socket, api_key="secret")["type"] == "ready"


def test_a_server_that_goes_lets_streams_end():
    x, texts = speech(1, gap=0.24)  # not final yet
    with served() as service, opened(service.url) as socket:
        assert start(socket)["type"] == "ready"
        socket.send(raw(x))
        while json.loads(socket.recv(timeout=servers.WAIT))["type"] != "partial":
            pass
        time.sleep(0.5)
        service.stop()
        found, code, reason = rest(socket)
    assert finals(found) == texts
    assert (found[-1]["type"], code) == ("done", 1012) and "goes down" in reason
