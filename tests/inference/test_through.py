"""One streamed pass over a long recording: the text of one piece, in memory that stays."""

import json
import sys

import pytest
import soundfile as sf
import torch

from inference import Recognizer
from inference.through import Through
from inference.transcript import transcript_of
from tests.recipes import runs
from tests.recipes.causal import PAUSE, causal_package, chunked_package, speech
from tests.recipes.packages import RATE, hearing_package


@pytest.fixture(scope="module", params=[causal_package, chunked_package], ids=["causal", "chunked"])
def recognizer(request):
    return Recognizer.from_folder(request.param(), "cpu")


def one_piece(recognizer, x):
    """The transcript of samples that are heard and searched at once."""
    return transcript_of(recognizer.words([torch.from_numpy(x)])[0], len(x) / RATE)


@pytest.mark.parametrize("gap", [0.12, 0.6, PAUSE])
def test_the_text_is_that_of_one_piece(recognizer, gap):
    x, _ = speech(12, gap=gap)
    expected = one_piece(recognizer, x)
    found = recognizer.transcribe(x, RATE, chunk_seconds=0)
    assert len(x) / RATE > recognizer.whole_seconds
    assert found == expected and len(expected.words) > 20
    assert [s.text for s in found.segments] == [s.text for s in expected.segments]
    for word, other in zip(found.words, expected.words, strict=True):
        assert word.start == pytest.approx(other.start, abs=1e-6)
        assert word.end == pytest.approx(other.end, abs=1e-6)
        assert word.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_blocks_change_nothing_and_settled_words_stay(recognizer):
    x = torch.from_numpy(speech(8, gap=0.6)[0])
    expected = one_piece(recognizer, x.numpy()).text.split()
    for size in (999, 2 * RATE, len(x)):
        through, longest = Through(recognizer), 0
        for block in x.split(size):
            before = list(through.settled)
            through.push(block)
            assert through.settled[: len(before)] == before
            longest = max(longest, len(through.maybe()))
        assert [w.text for w in through.finish()] == expected
        assert through.seconds == len(x) / RATE and (longest > 0 or size == len(x))


def test_a_piece_without_a_pause_ends_somewhere(recognizer, monkeypatch):
    monkeypatch.setattr("inference.through.LONGEST", 3.0)
    monkeypatch.setattr("inference.through.PAUSE", 2.0)
    x, texts = speech(8, gap=0.6)
    through = Through(recognizer)
    for block in torch.from_numpy(x).split(RATE):
        through.push(block)
        assert len(through.held) * through.hop < 3 + 2 + 1
    assert " ".join(w.text for w in through.finish()) == " ".join(texts)


def test_who_hears_in_windows_still(recognizer, monkeypatch):
    assert Recognizer.from_folder(hearing_package(), "cpu").through() is None
    monkeypatch.setattr(recognizer.normalize, "norm_type", "sentence")
    assert recognizer.through() is None
    monkeypatch.undo()
    assert recognizer.through() is not None
    monkeypatch.setitem(recognizer.model._modules, "decoder", torch.nn.Identity())
    assert recognizer.through() is None
    monkeypatch.undo()
    monkeypatch.setattr(recognizer, "through", None)  # asked for with chunk_seconds=0 alone
    x = speech(6)[0]
    for seconds in (None, 5):
        assert recognizer.transcribe(x, RATE, chunk_seconds=seconds).text


def test_silence_and_what_is_short(recognizer):
    for x in (torch.zeros(1), torch.zeros(100 * RATE)):
        through = Through(recognizer)
        through.push(x)
        assert through.finish() == [] == through.maybe()


PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_an_hour_in_bounded_memory(tmp_path):
    x, peaks = speech(6)[0], {}
    for minutes in (6, 60):
        path = tmp_path / f"{minutes}.flac"
        with sf.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(round(minutes * 60 * RATE / len(x))):
                file.write(x)
        script = ["transcribe.py", path, "--model", causal_package(), "--format", "json"]
        script += ["--chunk-seconds", "0"]
        done = runs.run([sys.executable, "-c", PEAK, *map(str, script)], timeout=1200)
        text, peak = done.stdout.splitlines()
        assert json.loads(text)["duration"] == pytest.approx(60 * minutes, rel=0.02)
        peaks[minutes] = int(peak)
    assert peaks[60] < peaks[6] + 100, peaks  # MB
