"""Chunked models hear a stream: what one pass in the same chunks hears, in packets of any size."""

import numpy as np
import pytest
import torch

from inference import Recognizer, StreamingRecognizer
from inference.package import package
from inference.streaming_ctc import StreamingCTC
from modules.search import ctc_greedy
from tests.recipes import runs
from tests.recipes.causal import PAUSE, chunked_package, speech
from tests.recipes.packages import LEARNS_S2S
from tests.test_streaming_recognizer import RATE, held, one_pass, packets


@pytest.fixture(scope="module")
def whole():
    return Recognizer.from_folder(chunked_package(), device="cpu", beam_size=1)


@pytest.mark.parametrize("chunk_size", [1, 8, 25])
@pytest.mark.parametrize("samples", [1, 639, 7361, 24000])
def test_log_probabilities_are_those_of_one_pass(whole, chunk_size, samples, monkeypatch):
    x = speech(4, gap=0.6)[0][:samples]
    own = one_pass(whole, x)
    monkeypatch.setattr(whole.model["encoder"].chunks.test_config, "chunk_size", chunk_size)
    expected = one_pass(whole, x)
    if samples == 24000:  # chunks matter
        assert ((own - expected).abs().max() < 1e-4) == (chunk_size == 8)
    for size in (37, 5120, "random", "all"):
        ctc, results = StreamingCTC(whole), []
        for packet in packets(x, size):
            results.append(ctc.advance(torch.from_numpy(packet)))
        come = max(0, (samples - ctc.lookahead) // ctc.hop + 1) // chunk_size * chunk_size
        assert sum(map(len, results)) == come
        results.append(ctc.advance(torch.zeros(0), final=True))
        torch.testing.assert_close(torch.cat(results), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_size", [5, 8])
def test_the_transcript_is_the_recognizers(whole, chunk_size, monkeypatch):
    monkeypatch.setattr(whole.model["encoder"].chunks.test_config, "chunk_size", chunk_size)
    stream = StreamingRecognizer(whole, endpoint_seconds=None)
    assert stream.chunk_seconds == pytest.approx(0.04 * chunk_size)
    x, texts = speech(4, gap=1.2)
    log_probs, found = one_pass(whole, x), []
    (tokens,) = ctc_greedy(log_probs[None], torch.tensor([len(log_probs)]))
    for size in (160, "random", "all"):
        for packet in packets(x, size):
            stream.push(packet)
        stream._hear(final=True)
        assert [t.id for t in stream.segmenter.tokens] == tokens
        found.append(stream.segmenter.words(len(x) / RATE))
        stream.reset()
        stream.push(x)
        transcript = stream.finish()
        assert transcript == whole.transcribe(x, RATE, chunk_seconds=0)
        assert transcript.text == " ".join(texts)
    assert all(words == found[0] for words in found)  # to the last bit


def test_a_chunk_is_heard_as_soon_as_its_look_ahead_is_there(whole):
    stream = StreamingRecognizer(whole)
    assert stream.chunk_seconds == 0.32
    # Two frames, three feature frames of 10 ms, and half a window of 25 ms.
    assert stream.lookahead_seconds == pytest.approx(0.08 + 0.0425)
    assert stream.delay_seconds == pytest.approx(0.28 + 0.1225)
    x, _ = speech(1)
    first, frames = round(stream.delay_seconds * RATE), []
    advance = stream.ctc.advance
    stream.ctc.advance = lambda *a: frames.append(len(y := advance(*a))) or y
    stream.push(x[: first - 1])
    assert frames == []
    stream.push(x[first - 1 : first])
    stream.push(x[first : first + 5119])
    assert frames == [8]
    stream.push(x[first + 5119 : first + 5120])
    assert frames == [8, 8]


def test_a_pause_makes_a_segment_final_and_the_state_stays_small(whole):
    stream = StreamingRecognizer(whole, history=False)
    x, texts = speech(3)
    finals, sizes = [], []
    for _ in range(3):
        for packet in packets(x, 3200):
            finals += stream.push(packet).finals
            sizes.append(held(stream))
    assert [f.text for f in finals] == 3 * texts
    assert len(set(sizes[10:])) == 1
    assert finals[0].end == pytest.approx(0.12 * len(texts[0]), abs=0.15)
    assert finals[1].start == pytest.approx(0.12 * len(texts[0]) + PAUSE, abs=0.15)
    assert stream.finish().text == ""


def test_silence_is_silent(whole):
    stream = StreamingRecognizer(whole)
    assert stream.push(0.003 * np.random.default_rng(0).standard_normal(5 * RATE)).finals == ()
    assert stream.finish().text == ""


@pytest.mark.parametrize("name", ["conmamba_causal_tiny", "conmamba_chunked_tiny"])
def test_an_s2s_model_streams_by_its_ctc_head(name, tmp_path):
    options = LEARNS_S2S | {"number_of_epochs": 6}
    runs.train(f"S2S/{name}.yaml", tmp_path / "run", **options)
    folder = package(tmp_path / "run", tmp_path / "package")
    recognizer = Recognizer.from_folder(folder, device="cpu")
    stream = StreamingRecognizer(recognizer)
    x, _ = speech(2, gap=0.24)
    for packet in packets(x, "random"):
        stream.push(packet)
    log_probs = one_pass(recognizer, x)
    (tokens,) = ctc_greedy(log_probs[None], torch.tensor([len(log_probs)]))
    assert stream.finish().text == " ".join(recognizer.tokenizer.decode(tokens).split()) != ""
