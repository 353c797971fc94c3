"""stream=true by the OpenAI client: text while a recording is heard, and what ends it."""

import threading

import numpy as np
import openai
import pytest

from inference.server.limits import Limits
from tests.recipes.causal import PAUSE, speech
from tests.recipes.packages import SENTENCES, said
from tests.server import servers
from tests.server.servers import metric, served, shared, until
from tests.server.test_limits import nothing_left
from tests.server.test_transcriptions import recording

WORDS = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=servers.WAIT)


def create(url, file, **options):
    return client_of(url).audio.transcriptions.create(model="any", file=file, **options)


def windows_only(monkeypatch, seconds=2):
    """A server's model that hears long recordings in windows, as a bidirectional one does."""
    recognizer = servers.recognizer()
    monkeypatch.setattr(recognizer, "through", lambda: None)
    monkeypatch.setattr(recognizer, "whole_seconds", seconds)
    monkeypatch.setattr(recognizer, "window_seconds", seconds)


def check(events, whole):
    """Deltas make the text of done, which is that of an answer without stream."""
    *deltas, done = events
    assert {d.type for d in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert "".join(d.delta for d in deltas) == done.text == whole.text
    assert done.usage.type == "duration"
    assert done.usage.seconds == whole.usage.seconds
    return deltas, done


@pytest.fixture
def one_window(monkeypatch):
    """A server that hears what is sent here in one piece."""
    monkeypatch.setattr(servers.recognizer(), "whole_seconds", 60)
    with served() as service:
        yield service


def test_a_streamed_pass(one_window):
    x, texts = speech(6)
    file = recording(x, "flac")
    whole = create(one_window.url, file)
    deltas, _ = check(list(create(one_window.url, file, stream=True)), whole)
    assert whole.text == " ".join(texts) and len(deltas) > 3
    nothing_left(one_window)


def test_words_come_with_their_times(one_window):
    file = recording(speech(3)[0], "flac")
    whole = create(one_window.url, file, **WORDS)
    deltas, done = check(list(create(one_window.url, file, stream=True, **WORDS)), whole)
    assert any(d.maybe for d in deltas)  # what may still change is shown, too
    told = [word for d in deltas for word in d.words]
    assert [w["word"] for w in told] == [w["word"] for w in done.words]
    for word, expected in zip(done.words, whole.words, strict=True):
        assert word["word"] == expected.word
        assert word["start"] == pytest.approx(expected.start, abs=1e-3)
    assert [s["text"] for s in done.segments] == [s.text for s in whole.segments]


@pytest.mark.parametrize("gap", [PAUSE, 0.12], ids=["silences", "overlaps"])
def test_window_by_window(gap, monkeypatch):
    windows_only(monkeypatch)
    x, _ = speech(6, gap=gap)
    with served() as service:
        file = recording(x, "flac")
        whole = create(service.url, file)
        deltas, _ = check(list(create(service.url, file, stream=True)), whole)
        assert len(deltas) > 3
        short = recording(said(SENTENCES[0]))
        found = list(create(service.url, short, stream=True))
        assert [e.type[16:] for e in found] == ["delta", "done"]
        assert found[1].text == SENTENCES[0]
        nothing = list(create(service.url, recording(np.zeros(9999)), stream=True))
        assert [(e.type, e.text) for e in nothing] == [("transcript.text.done", "")]
        nothing_left(service)


@pytest.fixture
def slow(monkeypatch):
    """After its first window the model waits until it is told to go on."""
    windows_only(monkeypatch)
    whole, go, asked = servers.recognizer().words, threading.Event(), []

    def words(signals):
        asked.append(len(signals))
        assert len(asked) == 1 or go.wait(servers.WAIT)
        return whole(signals)

    with served(limits=Limits(batch=1, seconds=3)) as service:
        monkeypatch.setattr(service.recognizer, "words", words)
        service.go = go
        yield service
        go.set()


def test_text_comes_before_the_end(slow):
    x, texts = speech(3)
    events = create(slow.url, recording(x, "flac"), stream=True)
    first = next(iter(events)).delta
    assert first and " ".join(texts).startswith(first)
    slow.go.set()
    assert list(events)[-1].text == " ".join(texts)
    nothing_left(slow)


def test_who_leaves_frees_the_place(slow):
    events = create(slow.url, recording(speech(3)[0], "flac"), stream=True)
    assert next(iter(events)).delta and slow.open["queue"] == 1
    events.close()
    until(lambda: slow.open["queue"] == 0)
    until(lambda: metric(slow.url, 'requests_total{status="499"}') == 1)
    nothing_left(slow)


def test_what_goes_wrong_later_is_told_in_an_event(slow):
    events = iter(create(slow.url, recording(speech(3)[0], "flac"), stream=True))
    assert next(events).delta
    with pytest.raises(openai.APIError, match="longer than 3 s"):
        next(events)
    nothing_left(slow)
    assert metric(slow.url, 'requests_total{status="504"}') == 1


def test_what_goes_wrong_before_is_a_status():
    for file, options, status, message in (
        (("a.wav", b"no sound" * 99), {}, 415, "a.wav is no audio"),
        (recording(np.zeros(0)), {}, 422, "holds no samples"),
        (recording(np.zeros(99)), {"response_format": "srt"}, 400, "srt comes in one piece"),
        (recording(np.zeros(99)), {"extra_body": {"stream": "x"}}, 400, "neither true nor false"),
    ):
        with pytest.raises(openai.APIStatusError, match=message) as error:
            create(shared().url, file, **{"stream": True, **options})
        assert error.value.status_code == status
    until(lambda: not shared().left())
    assert "Traceback" not in shared().log()


def test_damage_in_the_middle():
    name, whole = recording(np.tile(speech(6)[0], 3), "flac")
    place = len(whole) * 2 // 3
    damaged = whole[:place] + bytes(5000) + whole[place + 5000 :]
    events = []
    with pytest.raises(openai.APIError, match=f"{name} is damaged"):
        events.extend(create(shared().url, (name, damaged), stream=True))
    until(lambda: not shared().left())  # the error is sent before the upload is thrown away
