"""Chunked models hear a stream: what one pass in the same chunks hears, in packets of any size."""

import sys

import numpy as np
import pytest
import soundfile as sf
import torch

import export as script
from inference import Recognizer, StreamingRecognizer
from inference.export import export
from inference.onnx import OnnxRecognizer
from inference.package import package
from inference.streaming_ctc import StreamingCTC
from modules.errors import UserError
from modules.search import ctc_greedy
from tests.recipes import runs
from tests.recipes.causal import PAUSE, chunked_package, speech
from tests.recipes.packages import LEARNS_S2S
from tests.test_docs_run import program
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


@pytest.fixture(scope="module", params=["conmamba_causal_tiny", "conmamba_chunked_tiny"])
def s2s(request, tmp_path_factory):
    """Package of a model with a decoder."""
    folder, options = tmp_path_factory.mktemp("s2s"), LEARNS_S2S | {"number_of_epochs": 6}
    runs.train(f"S2S/{request.param}.yaml", folder / "run", **options)
    return package(folder / "run", folder / "package")


def test_an_s2s_model_streams_by_its_ctc_head(s2s):
    recognizer = Recognizer.from_folder(s2s, device="cpu")
    stream = StreamingRecognizer(recognizer)
    x, _ = speech(2, gap=0.24)
    for packet in packets(x, "random"):
        stream.push(packet)
    log_probs = one_pass(recognizer, x)
    (tokens,) = ctc_greedy(log_probs[None], torch.tensor([len(log_probs)]))
    assert stream.finish().text == " ".join(recognizer.tokenizer.decode(tokens).split()) != ""


# ---- Exported ----


def test_the_step_of_an_exported_file_looks_ahead(whole, tmp_path, monkeypatch):
    path, found = export(chunked_package(), "onnx", tmp_path / "a.onnx", streaming=True)
    assert found.largest < 1e-4
    exported = OnnxRecognizer.from_file(path, beam_size=1)
    assert (exported.about["frames_multiple_of"], exported.about["frames_again"]) == (32, 8)
    x, texts = speech(4, gap=0.6)
    signals = [x, x[:20_000], x[:999]]
    expected = whole.transcribe(signals, RATE, chunk_seconds=0)
    assert expected[0].text == " ".join(texts)
    for frames in (32, 320):
        monkeypatch.setattr("inference.onnx.recognizer.STEP", frames)
        assert exported.transcribe(signals, RATE, chunk_seconds=0) == expected
    # The guide's program.
    path.rename(tmp_path / "causal-streaming.onnx")
    monkeypatch.chdir(tmp_path)
    features = exported.features(x)[None]
    last = program("export", 1, features=features, lengths=np.array([features.shape[1]]))
    found, (y,) = last["log_probs"][0, : last["frames"][0]], exported.log_probs([x])
    np.testing.assert_allclose(found, y[-len(found) :], atol=1e-4)


@pytest.mark.parametrize(
    ("target", "streaming"),
    [
        ("torchscript", False),
        ("torchscript", True),
        pytest.param("onnx", False, marks=pytest.mark.slow),
        pytest.param("torch-export", False, marks=pytest.mark.slow),
        pytest.param("torch-export", True, marks=pytest.mark.slow),
    ],
)
def test_chunks_are_exported(target, streaming, tmp_path):
    suffix = {"torchscript": "ts", "onnx": "onnx", "torch-export": "pt2"}[target]
    _, found = export(chunked_package(), target, tmp_path / f"a.{suffix}", streaming=streaming)
    assert found.largest < 1e-4


@pytest.mark.parametrize("target", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_s2s_model_is_exported_without_its_decoder(target, s2s, tmp_path, monkeypatch, capsys):
    path = tmp_path / ("a.ts" if target == "torchscript" else "a.onnx")
    command = ["export.py", "--model", s2s, "--to", target, "--output", path, "--streaming"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    script.main()
    shown = capsys.readouterr()
    assert "100.00 %" in shown.out and "note: the decoder is not exported" in shown.err
    if target == "torchscript":
        return
    x, _ = speech(2, gap=0.24)
    sf.write(tmp_path / "a.wav", x, RATE)
    command = [sys.executable, "transcribe.py", tmp_path / "a.wav", "--model", path, "--beam", 1]
    heard = runs.run([*map(str, command)])
    recognizer = Recognizer.from_folder(s2s, device="cpu")
    log_probs = one_pass(recognizer, x)
    (tokens,) = ctc_greedy(log_probs[None], torch.tensor([len(log_probs)]))
    assert heard.stdout.strip() == " ".join(recognizer.tokenizer.decode(tokens).split())


def test_what_has_no_chunk_has_no_step(tmp_path, monkeypatch):
    recognizer = Recognizer.from_folder(chunked_package(), device="cpu")
    recognizer.model["encoder"].chunks.test_config.chunk_size = 0
    monkeypatch.setattr(Recognizer, "from_folder", lambda *a, **b: recognizer)
    with pytest.raises(UserError, match="chunk_size=0, which hears whole recordings"):
        export(chunked_package(), "torchscript", tmp_path / "a.ts", streaming=True)
