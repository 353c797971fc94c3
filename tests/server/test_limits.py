"""What a server refuses, and what is left behind by those who leave: nothing."""

import http.client
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile as sf

from inference.server.limits import Limits
from tests.recipes.packages import RATE, SENTENCES, said
from tests.server import servers
from tests.server.servers import address, begin, form, get, post, served, until
from tests.server.test_transcriptions import recording

GOOD = recording(said(SENTENCES[0]))[1]


@pytest.fixture
def slow(monkeypatch):
    """The model waits until it is told to go on: an Event, and what it was asked to hear."""
    whole, go, asked = servers.recognizer().words, threading.Event(), []

    def words(signals):
        asked.append(len(signals))
        assert go.wait(servers.WAIT)
        return whole(signals)

    with served(limits=Limits(queue=2, batch=4)) as service:
        monkeypatch.setattr(service.recognizer, "words", words)
        service.go, service.asked = go, asked
        yield service
        go.set()


def busy(service, number):
    until(lambda: service.open["queue"] == number)


def nothing_left(service):
    until(lambda: service.open["queue"] == 0)
    until(lambda: not list(service.folder.iterdir()))


# ---- Size ----


def test_an_upload_that_is_too_large():
    with served(limits=Limits(upload=100_000)) as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
        for size in (100_001, 300_000, 20_000_000):
            with pytest.raises(openai.APIStatusError) as error:
                client.audio.transcriptions.create(model="any", file=("a.wav", bytes(size)))
            assert error.value.status_code == 413
            assert "larger than the 0.1 MB" in error.value.message
        nothing_left(service)
        assert post(service.url, GOOD)[0] == 200


def test_a_declared_size_is_refused_before_the_body():
    with served(limits=Limits(upload=100_000)) as service:
        with socket.create_connection(address(service.url)) as client:
            head = "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999"
            client.sendall(
                f"{head}\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n".encode()
            )
            assert client.recv(1000).startswith(b"HTTP/1.1 413")
        nothing_left(service)


@pytest.mark.parametrize(
    "path, options, expected",
    [
        ("/v1/audio/transcriptions", {"api_key": "secret"}, b"401"),
        ("/v1/audio/transcriptions", {"limits": Limits(upload=100_000)}, b"413"),
        ("/v1/nowhere", {}, b"404"),
    ],
)
def test_a_refusal_is_read_by_who_still_sends(path, options, expected):
    """The rest is sent after the answer came: a closed connection would reset it."""
    body, kind = form(bytes(3_000_000))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\n"
    with served(**options) as service:
        with socket.create_connection(address(service.url), servers.WAIT) as client:
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:500])
            assert client.recv(1, socket.MSG_PEEK) == b"H"
            for start in range(500, len(body), 100_000):
                client.sendall(body[start : start + 100_000])
            found = b"".join(iter(lambda: client.recv(1000), b""))
            assert found.startswith(b"HTTP/1.1 " + expected) and found.endswith(b"}")
        nothing_left(service)


def test_a_client_that_sends_no_more_is_let_go(monkeypatch):
    monkeypatch.setattr("inference.server.lingering.IDLE", 0.2)
    with served(api_key="secret") as service:
        for more in ("", "expect: 100-continue\r\n"):  # one that waits to be asked sends nothing
            with socket.create_connection(address(service.url), servers.WAIT) as client:
                head = "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\nconnection: close"
                client.sendall(f"{head}\r\n{more}content-length: 99\r\n\r\nab".encode())
                found = b"".join(iter(lambda: client.recv(1000), b""))
                assert found.startswith(b"HTTP/1.1 401") and found.endswith(b"}")


def test_chunked_uploads_are_counted():
    sent = 0

    def endless():
        nonlocal sent
        head, _ = form(b"")
        yield head.split(b"\r\n--sep--")[0]
        while True:
            sent += 50_000
            yield bytes(50_000)

    with served(limits=Limits(upload=100_000)) as service:
        connection = http.client.HTTPConnection(*address(service.url), timeout=10)
        headers = {"content-type": "multipart/form-data; boundary=sep"}
        connection.putrequest("POST", "/v1/audio/transcriptions")
        for item in (*headers.items(), ("transfer-encoding", "chunked")):
            connection.putheader(*item)
        connection.endheaders()
        for block in endless():
            connection.send(b"%x\r\n%s\r\n" % (len(block), block))
            if sent >= 400_000:
                break
        assert connection.getresponse().status == 413
        nothing_left(service)


# ---- Length ----


def test_a_small_file_of_many_hours(tmp_path):
    path = tmp_path / "bomb.flac"
    with sf.SoundFile(path, "w", 8000, 1, format="FLAC") as file:
        for _ in range(10):
            file.write(np.zeros(8000 * 360, np.int16))
    assert path.stat().st_size < 1_000_000
    with served(limits=Limits(audio=600)) as service:
        code, _, body = post(service.url, path.read_bytes(), "bomb.flac")
        assert (
            code == 413 and "lasts 3600 s and this server takes 600 s" in body["error"]["message"]
        )
        nothing_left(service)


def test_a_header_that_hides_the_length(tmp_path, monkeypatch):
    """What tells none is counted and heard in windows; what tells a wrong one is refused."""
    av = pytest.importorskip("av")
    path = tmp_path / "a.mka"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono")
        for i in range(40):
            frame = av.AudioFrame(format="s16", layout="mono", samples=48000)
            frame.rate, frame.pts = 48000, i * 48000
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    content = path.read_bytes()
    place = content.index(b"\x44\x89\x88") + 3  # Segment > Info > Duration, ms
    lying = content[:place] + struct.pack(">d", 1000.0) + content[place + 8 :]
    hiding = content[: place - 3] + b"\xec\x89" + bytes(9) + content[place + 8 :]  # Void
    longest = []
    whole = servers.recognizer().words

    def words(signals):
        longest.extend(len(s) for s in signals)
        return whole(signals)

    monkeypatch.setattr(servers.recognizer(), "words", words)
    with served(limits=Limits(audio=30)) as service:
        longest.clear()
        code, _, body = post(service.url, lying, "a.mka")
        assert code == 415 and "says 1.00 s and is longer" in body["error"]["message"]
        code, _, body = post(service.url, hiding, "a.mka")
        assert code == 413 and "lasts more than that" in body["error"]["message"]
        assert max(longest) <= 2 * RATE
        nothing_left(service)


# ---- Queue and time ----


def test_a_full_queue_tells_when_to_come_again(slow):
    with ThreadPoolExecutor(2) as clients:
        running = [clients.submit(post, slow.url, GOOD) for _ in range(2)]
        busy(slow, 2)
        code, headers, body = post(slow.url, GOOD)
        assert code == 503 and int(headers["retry-after"]) > 0
        assert "all 2 places are taken" in body["error"]["message"]
        assert servers.metric(slow.url, "queue") == 2
        assert get(f"{slow.url}/health")[0] == 200  # what it computes holds nobody else up
        slow.go.set()
        assert [r.result()[2]["text"] for r in running] == [SENTENCES[0]] * 2
    # The OpenAI client comes again by itself.
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=5)
    slow.go.clear()
    with ThreadPoolExecutor(3) as clients:
        running = [clients.submit(post, slow.url, GOOD) for _ in range(2)]
        busy(slow, 2)
        create = client.audio.transcriptions.create
        third = clients.submit(create, model="any", file=("a.wav", GOOD))
        until(lambda: servers.metric(slow.url, 'requests_total{status="503"}') >= 2)
        slow.go.set()
        assert third.result().text == SENTENCES[0]


def test_what_takes_too_long():
    with served(limits=Limits(seconds=0.3)) as service:
        with socket.create_connection(address(service.url)) as client:
            head = "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-length: 9999"
            client.sendall(
                f"{head}\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n".encode()
            )
            assert client.recv(1000).startswith(b"HTTP/1.1 408")
        whole = service.recognizer.words
        service.recognizer.words = lambda signals: time.sleep(1) or whole(signals)
        try:
            code, headers, body = post(service.url, GOOD)
        finally:
            del service.recognizer.words
        assert code == 504 and "longer than 0.3 s" in body["error"]["message"]
        assert headers["x-should-retry"] == "false"
        nothing_left(service)


# ---- Those who leave ----


def test_a_client_that_leaves_while_it_sends(slow):
    client = begin(slow.url, GOOD, 0.5)
    busy(slow, 1)
    client.close()
    nothing_left(slow)
    assert servers.metric(slow.url, 'requests_total{status="499"}') == 1


def test_a_client_that_leaves_while_it_waits(slow):
    blocker = begin(slow.url, GOOD)  # its window is in the model's hands
    until(lambda: slow.asked == [1])
    with ThreadPoolExecutor(1) as clients:
        other = clients.submit(post, slow.url, GOOD)
        busy(slow, 2)
        blocker.close()
        busy(slow, 1)
        third = begin(slow.url, GOOD)
        until(lambda: len(slow.batcher.waiting) == 2)
        third.close()
        busy(slow, 1)
        slow.go.set()
        assert other.result()[2]["text"] == SENTENCES[0]
    assert slow.asked == [1, 1]  # the second that left was never computed
    nothing_left(slow)


# ---- Keys ----


def test_a_key():
    with served(api_key="secret") as service:
        for key in ("wrong", ""):
            client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key or "none")
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                client.audio.transcriptions.create(model="any", file=("a.wav", GOOD))
        assert post(service.url, GOOD)[0] == 401
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="secret")
        found = client.audio.transcriptions.create(model="any", file=("a.wav", GOOD))
        assert found.text == SENTENCES[0]
        for path in ("/health", "/ready", "/metrics", "/"):
            assert get(service.url + path)[0] == 200
        assert json.loads(get(f"{service.url}/ready")[2])["key"] is True


# ---- Ready ----


def test_the_log_tells_why_it_does_not_get_ready(monkeypatch, caplog):
    def words(signals):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(servers.recognizer(), "words", words)

    def look(service):
        until(lambda: "does not get ready" in caplog.text)
        assert "no kernel image" in caplog.text and get(f"{service.url}/ready")[0] == 503
        service.warm = True  # so that `served` goes on

    with caplog.at_level("ERROR", "mamba_asr.server"), served(early=look):
        pass


def test_it_is_ready_when_it_is_warm_and_until_it_goes(monkeypatch):
    whole, go = servers.recognizer().words, threading.Event()
    monkeypatch.setattr(
        servers.recognizer(), "words", lambda signals: go.wait(servers.WAIT) and whole(signals)
    )
    seen = []

    def look(service):
        until(lambda: servers.status(f"{service.url}/health") == 200)
        seen.append(get(f"{service.url}/ready")[0])
        go.set()

    with served(early=look) as service:
        seen.append(get(f"{service.url}/ready")[0])
        service.drain()
        seen.append(get(f"{service.url}/ready")[0])
        code, headers, _ = post(service.url, GOOD)
        assert code == 503 and headers["retry-after"]
    assert seen == [503, 200, 503]
