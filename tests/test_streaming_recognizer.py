"""StreamingRecognizer: what it hears is one pass over the whole, in packets of any size."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from inference import Recognizer, StreamingRecognizer
from inference.align import align
from inference.streaming_ctc import StreamingCTC
from modules.errors import UserError
from modules.search import ctc_greedy
from tests.recipes.causal import PAUSE, causal_package, speech
from tests.recipes.packages import RATE, SENTENCES, said

SIZES = [1, 37, 160, 5120, "random", "all"]


@pytest.fixture(scope="module")
def causal():
    return causal_package()


@pytest.fixture(scope="module")
def whole(causal):
    return Recognizer.from_folder(causal, device="cpu", beam_size=1)


@pytest.fixture
def stream(whole):
    return StreamingRecognizer(whole)


def packets(x, size):
    """Cut samples (N,) into packets; "random" ones may be empty."""
    if size == "all":
        return [x]
    if size == "random":
        draw = random.Random(len(x))
        cuts = sorted(draw.choices(range(len(x) + 1), k=40))
        return [x[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
    return [x[i : i + size] for i in range(0, len(x), size)]


@torch.no_grad()
def one_pass(recognizer, x):
    """Log-probabilities (T, V) of all samples at once."""
    y, lengths = recognizer.encode(torch.from_numpy(x)[None], torch.tensor([len(x)]))
    assert lengths.item() == y.shape[1]
    return recognizer.model["ctc_head"](y).log_softmax(dim=-1)[0]


# ---- Exactness ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("samples", [1, 100, 639, 640, 1600, 7361, 24000])
def test_log_probabilities_are_those_of_one_pass(whole, size, samples):
    if size == 1 and samples > 2000:
        samples = 2000  # a call a sample
    x = speech(4, gap=0.6)[0][:samples]
    ctc, results = StreamingCTC(whole), []
    for packet in packets(x, size):
        results.append(ctc.advance(torch.from_numpy(packet)))
    # A frame comes as soon as all that it reads is there.
    come, hop = sum(map(len, results)), round(whole.seconds_per_frame * RATE)
    assert come == max(0, (samples - ctc.lookahead) // hop + 1)
    results.append(ctc.advance(torch.zeros(0), final=True))
    torch.testing.assert_close(torch.cat(results), one_pass(whole, x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.32, 1.0])
def test_tokens_are_those_of_one_pass(whole, chunk_seconds):
    stream = StreamingRecognizer(whole, chunk_seconds, endpoint_seconds=None)
    x, texts = speech(4, gap=0.6)
    log_probs = one_pass(whole, x)
    (tokens,) = ctc_greedy(log_probs[None], torch.tensor([len(log_probs)]))
    found = []
    for size in SIZES[chunk_seconds != 0.32 :]:
        for packet in packets(x, size):
            partial = stream.push(packet)
            assert not partial.finals
        stream._hear(final=True)
        assert [t.id for t in stream.segmenter.tokens] == tokens
        found.append(stream.segmenter.words(len(x) / RATE))
        stream.reset()
    assert all(words == found[0] for words in found)  # to the last bit
    assert " ".join(w.text for w in found[0]) == " ".join(texts)


@pytest.mark.parametrize("size", [160, "random", "all"])
def test_the_transcript_is_the_recognizers(whole, stream, size):
    for number in (1, 3, 6):
        x, texts = speech(number, gap=1.2)
        for packet in packets(x, size):
            stream.push(packet)
        transcript = stream.finish()
        assert transcript == whole.transcribe(x, RATE, chunk_seconds=0)
        assert transcript.text == " ".join(texts)
        log_probs = one_pass(whole, x)
        (tokens,) = ctc_greedy(log_probs[None], torch.tensor([len(log_probs)]))
        hop, duration = whole.seconds_per_frame, len(x) / RATE
        expected = align(tokens, log_probs, hop, duration, whole.tokenizer)
        for ours, theirs in zip(transcript.words, expected, strict=True):
            assert ours.text == theirs.text
            assert (ours.start, ours.end) == pytest.approx((theirs.start, theirs.end))
            assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-3)


# ---- Partial and final results ----


def test_partial_results_grow(stream):
    x, texts = speech(1, gap=0.6)
    seen = [stream.push(packet).text for packet in packets(x, 1600)]
    assert seen[0] == "" and seen[-1] == texts[0]
    assert all(b.startswith(a) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("size", [37, 5120, "random", "all"])
@pytest.mark.parametrize("history", [True, False])
def test_a_pause_makes_a_segment_final(whole, size, history):
    stream = StreamingRecognizer(whole, history=history)
    x, texts = speech(3)
    finals = []
    for packet in packets(x, size):
        partial = stream.push(packet)
        finals += partial.finals
        if partial.finals and size in (37, 5120):
            assert partial.text == ""
    assert [f.text for f in finals] == texts
    assert stream.finish().text == (" ".join(texts) if history else "")
    start = 0.0
    for final, text in zip(finals, texts, strict=True):
        assert final.start == pytest.approx(start, abs=0.15)
        assert final.end == pytest.approx(start + 0.12 * len(text), abs=0.15)
        assert " ".join(w.text for w in final.words) == text
        start += 0.12 * len(text) + PAUSE


def test_a_shorter_pause_ends_segments_when_asked(whole):
    x, texts = speech(3, gap=0.6)
    x = np.append(x, np.zeros(1600, dtype=x.dtype))  # the end of its chunk
    found = {}
    for pause in (0.4, 0.8, None):
        stream = StreamingRecognizer(whole, endpoint_seconds=pause)
        found[pause] = [f.text for f in stream.push(x).finals]
        assert stream.finish().text == " ".join(texts)
    assert found == {0.4: texts, 0.8: [], None: []}


def test_silence_has_no_segments(stream):
    assert stream.push(0.003 * np.random.default_rng(0).standard_normal(10 * RATE)).finals == ()
    assert stream.finish().text == ""


def test_a_segment_without_a_pause_ends_somewhere(whole, monkeypatch):
    monkeypatch.setattr("inference.segmenter.LONGEST", 3.0)
    x, texts = speech(8, gap=0.12)
    for history in (True, False):
        stream = StreamingRecognizer(whole, endpoint_seconds=None, history=history)
        finals = stream.push(x).finals
        assert len(finals) >= 3 and all(f.end - f.start <= 3 for f in finals)
        rest = stream.finish().text
        parts = [] if history else [f.text for f in finals]
        assert " ".join([*parts, rest]) == " ".join(texts)


def test_each_utterance_begins_anew(stream):
    first, second = said(SENTENCES[0]), said(SENTENCES[1])
    alone = []
    for x in (first, second):
        stream.push(x)
        alone.append(stream.finish())
    stream.push(first[:9000])
    stream.reset()
    stream.push(second)
    assert stream.finish().words == alone[1].words
    empty = stream.finish()
    assert (empty.text, empty.duration, empty.words) == ("", 0.0, ())


# ---- State ----


def held(stream):
    """Bytes of all tensors that go from one chunk to the next."""
    tensors = [stream.buffer, *tree_leaves(stream.ctc.state)]
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))


def test_state_is_of_constant_size(whole):
    stream, sizes = StreamingRecognizer(whole, history=False), []
    x, _ = speech(6, gap=1.2)
    for second in range(60):
        packet = np.roll(x, -second * RATE)[:RATE]
        stream.push(packet)
        if second in (0, 1, 9, 59):
            sizes.append(held(stream))
        assert len(stream.segmenter.tokens) <= 40
    assert len(set(sizes)) == 1
    assert stream.segmenter.history is None


# ---- A user's mistakes ----


def test_what_cannot_be_heard_is_an_error_and_changes_nothing(stream):
    x = said(SENTENCES[0])
    stream.push(x[:5000])
    for message, samples, rate in (
        ("sample_rate=8000 is not this model's 16000", x, 8000),
        ("is not one channel of samples", np.stack([x, x]), None),
        ("not finite", np.array([0.1, np.nan], dtype=np.float32), None),
        ("of type list is unknown", [0.1], None),
    ):
        with pytest.raises(UserError, match=message):
            stream.push(samples, rate)
    stream.push(x[5000:], sample_rate=RATE)
    assert stream.finish().text == SENTENCES[0]


@pytest.mark.filterwarnings("error")
def test_integers_are_scaled(stream):
    data = (said(SENTENCES[0]) * 32767).astype(np.int16).tobytes()
    stream.push(np.frombuffer(data, dtype=np.int16))
    assert stream.finish().text == SENTENCES[0]


def changed(causal, target, change):
    """A copy of the package with another configuration."""
    shutil.copytree(causal, target)
    config = json.loads((target / "config.json").read_text())
    change(config["parts"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("message", "part", "value"),
    [
        ("norm_type=sentence.*needs the whole", "normalize", {"norm_type": "sentence"}),
        ("top_db=80.0.*loudest frame", "features", {"top_db": 80.0}),
        ("encoder reads whole recordings", "encoder", {"causal": False}),
    ],
)
def test_a_model_that_needs_the_future_is_refused(causal, tmp_path, message, part, value):
    folder = changed(causal, tmp_path / "package", lambda parts: parts[part].update(value))
    Recognizer.from_folder(folder, device="cpu")
    with pytest.raises(UserError, match=message):
        StreamingRecognizer.from_folder(folder, device="cpu")


def test_options_that_mean_nothing_are_refused(causal):
    for message, options in (
        ("chunk_seconds=0.01 is shorter than a frame", {"chunk_seconds": 0.01}),
        ("chunk_seconds=nan", {"chunk_seconds": float("nan")}),
        ("endpoint_seconds=0 is no pause", {"endpoint_seconds": 0}),
        ("device='tpu' is unknown", {"device": "tpu"}),
    ):
        with pytest.raises(UserError, match=message):
            StreamingRecognizer.from_folder(causal, **{"device": "cpu", **options})


def test_delays_are_told(stream):
    assert stream.chunk_seconds == 0.32
    # Three feature frames of 10 ms, and half a window of 25 ms.
    assert stream.lookahead_seconds == pytest.approx(0.0425)
    assert stream.delay_seconds == pytest.approx(0.28 + 0.0425)
