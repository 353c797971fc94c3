"""transcribe.py and Recognizer: words with times, long audio, many files, a user's mistakes."""

import io
import itertools
import json
import os
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

import transcribe as script
from inference import Recognizer
from inference.audio import Recording
from inference.jobs import ESCAPED
from modules.errors import UserError
from tests.recipes import runs
from tests.recipes.packages import (
    LEARNS_S2S,
    RECIPES,
    SENTENCES,
    hearing_package,
    make_package,
    said,
)

RATE = runs.RATE


@pytest.fixture(scope="module")
def ctc():
    """A package that hears."""
    return hearing_package()


@pytest.fixture(scope="module")
def s2s():
    """A package with a decoder that hears."""
    return make_package(RECIPES["s2s"], LEARNS_S2S)[1]


@pytest.fixture(scope="module")
def recognizer(ctc):
    return Recognizer.from_folder(ctc, device="cpu")


@pytest.fixture
def folder(tmp_path):
    """Recordings of the sentences, of several kinds."""
    place = tmp_path / "audio"
    (place / "more").mkdir(parents=True)
    kinds = ["a.wav", "b.flac", "c.ogg", "more/a.wav", "more/d.mp3", "more/e.wav"]
    for name, text in zip(kinds, SENTENCES, strict=True):
        x = said(text)
        if name == "more/e.wav":
            time = np.arange(int(len(x) / RATE * 44100)) / 44100
            x = np.stack([np.interp(time, np.arange(len(x)) / RATE, x)] * 2, 1)
        sf.write(place / name, x, RATE if x.ndim == 1 else 44100)
    return place


def call(monkeypatch, capsys, *arguments, status=0, stdin=b""):
    """transcribe.py: what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["transcribe.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == status
    return capsys.readouterr()


# ---- Words ----


@pytest.mark.parametrize("kind", ["ctc", "s2s"])
def test_words_have_times_and_confidences(kind, request):
    recognizer = Recognizer.from_folder(request.getfixturevalue(kind), device="cpu")
    text = SENTENCES[0]
    transcript = recognizer.transcribe(said(text, before=0.3), RATE)
    assert transcript.text == text == " ".join(w.text for w in transcript.words)
    place = 0
    for word in transcript.words:
        start = 0.3 + 0.12 * place
        place += len(word.text) + 1
        assert word.start == pytest.approx(start, abs=0.1)
        assert word.end == pytest.approx(start + 0.12 * len(word.text), abs=0.1)
        assert 0.8 < word.confidence <= 1
    (segment,) = transcript.segments
    assert (segment.text, segment.start) == (text, transcript.words[0].start)
    assert segment.end == transcript.words[-1].end <= transcript.duration


def test_noise_lowers_confidence(recognizer):
    def mean(noise):
        found = recognizer.transcribe([said(t, noise=noise) for t in SENTENCES], RATE)
        confidences = [w.confidence for t in found for w in t.words]
        assert all(0 <= c <= 1 for c in confidences)
        return np.mean(confidences)

    assert mean(0.003) > mean(0.005)


def test_words_of_a_decoder_are_its_text(s2s):
    recognizer = Recognizer.from_folder(s2s, device="cpu")
    signals = [said(t) for t in SENTENCES]
    for transcript, x in zip(recognizer.transcribe(signals, RATE), signals, strict=True):
        words = transcript.words
        assert transcript.text == " ".join(w.text for w in words)
        assert transcript == recognizer.transcribe(x, RATE)
        assert all(0 <= w.start <= w.end <= transcript.duration for w in words)
        assert all(v.end <= w.start for v, w in itertools.pairwise(words))
        assert all(0 <= w.confidence <= 1 for w in words)
    assert any(t.words for t in recognizer.transcribe(signals, RATE))


# ---- Long audio ----


@pytest.mark.parametrize("gap", [0.5, 0.12])
@pytest.mark.parametrize("chunk_seconds", [None, 3, 5])
def test_long_audio_has_the_words_of_its_parts(recognizer, gap, chunk_seconds):
    texts = [SENTENCES[i] for i in np.random.default_rng(0).integers(0, 6, size=30)]
    x = np.concatenate([said(t, after=gap, seed=i) for i, t in enumerate(texts)])
    transcript = recognizer.transcribe(x, RATE, chunk_seconds=chunk_seconds)
    assert transcript.text == " ".join(texts)
    assert transcript.duration == len(x) / RATE > 40
    assert all(v.end <= w.start + 0.05 for v, w in itertools.pairwise(transcript.words))
    time = np.cumsum([0.12 * len(t) + gap for t in texts])
    last = np.cumsum([len(t.split()) for t in texts]) - 1
    ends = [transcript.words[i].end for i in last]
    assert ends == pytest.approx(time - gap, abs=0.12)


def test_long_audio_is_read_and_heard_in_pieces(recognizer, monkeypatch):
    hour, produced, heard = 3600, 0, []
    second = 0.1 * torch.randn(RATE)

    def blocks():
        nonlocal produced
        for _ in range(hour):
            produced += 1
            yield second

    def words(signals):
        assert sum(map(len, signals)) <= 4 * 10 * RATE
        heard.append(sum(map(len, signals)) / RATE)
        assert produced - sum(heard) <= 10 + 1  # a window more, no more, is read
        return [[] for _ in signals]

    monkeypatch.setattr(recognizer, "words", words)
    seconds = []
    recording = Recording("hour", RATE, hour, blocks)
    transcript = recognizer._hear_long(recording, 4, 10, lambda *p: seconds.append(p[1]))
    assert transcript.duration == hour == seconds[-1]
    assert len(heard) == len(seconds) >= hour / 40


def test_a_package_knows_the_lengths_of_its_training(ctc, recognizer):
    config = json.loads((ctc / "config.json").read_text())
    assert config["whole_seconds"] == recognizer.whole_seconds == 2
    assert config["window_seconds"] == recognizer.window_seconds == 2


# ---- Many files ----


def test_many_files(recognizer, folder):
    paths = [folder / "a.wav", folder / "none.wav", folder / "b.flac", __file__]
    results = list(recognizer.transcribe_files(paths, batch_size=2))
    assert [r.path for r in results] == [str(p) for p in paths]
    found = [r.transcript and r.transcript.text for r in results]
    assert found == [SENTENCES[0], None, SENTENCES[1], None]
    assert "there is no file" in results[1].error and "no audio" in results[3].error
    unordered = recognizer.transcribe_files(paths, batch_size=2, in_order=False)
    assert {r.path: r for r in unordered} == {r.path: r for r in results}
    endless = recognizer.transcribe_files(itertools.repeat(paths[0]), batch_size=1)
    assert [r.transcript.text for r in itertools.islice(endless, 20)] == SENTENCES[:1] * 20
    with pytest.raises(UserError, match="batch_size=0"):
        list(recognizer.transcribe_files(paths, batch_size=0))


# ---- The command line ----


def test_text_on_stdout(ctc, folder, monkeypatch, capsys):
    shown = call(monkeypatch, capsys, folder / "a.wav", "--model", ctc)
    assert (shown.out, shown.err) == (SENTENCES[0] + "\n", "")
    shown = call(monkeypatch, capsys, folder, "--model", ctc, "--batch-size", 2)
    names = [line.split("\t") for line in shown.out.splitlines()]
    assert [text for _, text in names] == SENTENCES
    assert names[3][0] == str(folder / "more/a.wav")
    shown = call(monkeypatch, capsys, folder / "*.[fo]*", folder / "c.ogg", "--model", ctc)
    assert [line.split("\t")[1] for line in shown.out.splitlines()] == SENTENCES[1:3]
    content = (folder / "more/e.wav").read_bytes()
    assert call(monkeypatch, capsys, "-", "--model", ctc, stdin=content).out == f"{SENTENCES[5]}\n"
    shown = call(monkeypatch, capsys, "-", "--model", ctc, stdin=b"", status=1)
    assert "error: - is empty" in shown.err


def test_json_on_stdout(ctc, folder, monkeypatch, capsys):
    options = ["--model", ctc, "--format", "json", "--word-timestamps"]
    out = call(monkeypatch, capsys, folder / "a.wav", folder / "b.flac", *options).out
    found = [json.loads(line) for line in out.splitlines()]
    assert [f["file"] for f in found] == [str(folder / "a.wav"), str(folder / "b.flac")]
    assert [w["text"] for w in found[0]["words"]] == SENTENCES[0].split()
    assert set(found[1]["words"][0]) == {"text", "start", "end", "confidence"}


@pytest.mark.parametrize("form", ["txt", "json", "srt", "vtt", "tsv"])
def test_files_are_written_whole(form, ctc, folder, tmp_path, monkeypatch, capsys):
    (folder / "bad.wav").write_text("no sound" * 100)
    target = tmp_path / "new" / "out"
    options = ["--model", ctc, "--format", form, "--output-dir", target]
    shown = call(monkeypatch, capsys, folder, *options, status=1)
    assert shown.out == ""
    assert f"error: {folder / 'bad.wav'} is no audio" in shown.err
    assert "1 of 7 could not be transcribed" in shown.err
    written = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert written == {f"{n}.{form}" for n in ("a", "b", "c", "more/a", "more/d", "more/e")}
    assert "DEAF FACE" in (target / f"b.{form}").read_text()
    # Again: only when asked, and refused before anything is done.
    before = runs.files_of(target)
    (target / f"a.{form}").unlink()
    shown = call(monkeypatch, capsys, folder, *options, status=2)
    assert "exists; give --overwrite" in shown.err
    assert not (target / f"a.{form}").exists()
    call(monkeypatch, capsys, folder, *options, "--overwrite", status=1)
    assert runs.files_of(target) == before


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NAMES = [b"bad\xff.wav", "\u0437\u0432\u0443\u043a.wav".encode()]  # no UTF-8; Cyrillic


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
@pytest.mark.parametrize("locale", [{"PYTHONUTF8": "1"}, ASCII], ids=["utf8", "ascii"])
def test_names_are_bytes(locale, ctc, tmp_path):
    for name, text in zip(NAMES, SENTENCES, strict=False):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            sf.write(file, said(text), RATE, format="WAV")
    command = [sys.executable, "transcribe.py", str(tmp_path), "--model", str(ctc)]
    command += ["--batch-size", "1"]
    wanted = {os.fsencode(tmp_path) + b"/" + n: t for n, t in zip(NAMES, SENTENCES, strict=False)}
    strict = {**locale, "PYTHONIOENCODING": ":strict"}

    done = runs.run(command, **strict)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == SENTENCES[:2]

    done = runs.run([*command, "--format", "json"], **strict)
    assert done.returncode == 0, done.stderr
    heard = [json.loads(line) for line in done.stdout.splitlines()]
    assert {os.fsencode(h["file"]): h["text"] for h in heard} == wanted

    out = tmp_path / "out"
    done = runs.run([*command, "--format", "json", "--output-dir", str(out)], **strict)
    assert done.returncode == 0, done.stderr
    heard = [json.loads(path.read_text(encoding="utf-8")) for path in out.iterdir()]
    assert {os.fsencode(h["file"]): h["text"] for h in heard} == wanted


def test_what_an_encoding_lacks_is_json():
    text = "a\xe9\u0437\U0001f600\udcff"
    for encoding in ("ascii", "latin-1", "utf-8"):
        written = json.dumps(text, ensure_ascii=False).encode(encoding, ESCAPED)
        assert json.loads(written.decode(encoding)) == text


def test_a_name_as_long_as_names_can_be(ctc, folder, tmp_path, monkeypatch, capsys):
    recording = folder / ("n" * 245 + ".wav")
    (folder / "a.wav").rename(recording)
    options = ["--model", ctc, "--output-dir", tmp_path / "out"]
    call(monkeypatch, capsys, recording, *options)
    (written,) = (tmp_path / "out").iterdir()
    assert (written.name, written.read_text()) == ("n" * 245 + ".txt", SENTENCES[0] + "\n")


def test_nothing_is_left_of_a_file_that_fails(ctc, folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inference.jobs.os.replace", full)
    options = ["--model", ctc, "--output-dir", tmp_path / "out"]
    shown = call(monkeypatch, capsys, folder / "a.wav", *options, status=1)
    assert "No space left" in shown.err
    assert not list((tmp_path / "out").iterdir())


def test_mistakes_are_told_before_work(ctc, s2s, folder, tmp_path, monkeypatch, capsys):
    a, b = folder / "a.wav", folder / "b.flac"
    (folder / "b.wav").write_bytes(a.read_bytes())
    (tmp_path / "empty").mkdir()
    out = ["--output-dir", tmp_path / "out"]
    for message, *arguments in (
        ("there is no folder nowhere", a, "--model", "nowhere"),
        ("holds no recording", tmp_path / "empty", "--model", ctc),
        ("no file matches", folder / "*.xyz", "--model", ctc),
        ("--word-timestamps: txt has no times", a, "--model", ctc, "--word-timestamps"),
        ("2 recordings do not fit", a, b, "--model", ctc, "--format", "srt"),
        ("would both be written", folder / "b.wav", b, "--model", ctc, *out),
        ("would both be written", a, folder / "more/a.wav", "--model", ctc, *out),
        ("give another folder", a, "--model", ctc, "--output-dir", a),
        ("batch_size=0 must be at least 1", a, "--model", ctc, "--batch-size", 0),
        ("beam_size=0 must be at least 1", a, "--model", ctc, "--beam", 0),
        ("give 2 or more, or 0", a, "--model", ctc, "--chunk-seconds", 1),
        ("'nan' must be a number", a, "--model", ctc, "--chunk-seconds", "nan"),
        ("'nan' must be a number", a, "--model", ctc, "--lm-weight", "nan"),
        ("device='tpu' is unknown", a, "--model", ctc, "--device", "tpu"),
        ("no.arpa is no file", a, "--model", ctc, "--lm", tmp_path / "no.arpa"),
        ("whose search takes a word n-gram", a, "--model", ctc, "--lm", tmp_path),
        ("bonus a word goes with", a, "--model", s2s, "--lm", tmp_path, "--word-bonus", 1),
        ("bonus a word goes with", a, "--model", s2s, "--word-bonus", 1),
        (f"{a} is a file, and here a package", a, "--model", a),
        ("n-gram goes with CTC models", a, "--model", s2s, "--lm", "a.arpa"),
        ("lm=nowhere: there is no such folder", a, "--model", s2s, "--lm", "nowhere"),
    ):
        shown = call(monkeypatch, capsys, *arguments, status=2)
        assert message in shown.err and "Traceback" not in shown.err
        assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_stdin_that_is_closed(ctc):
    command = f"exec {sys.executable} transcribe.py - --model {ctc} <&-"
    done = runs.run(["bash", "-c", command])
    assert done.returncode == 2
    assert done.stderr.startswith("error: -: stdin is closed;") and done.stderr.count("\n") == 1


def test_the_beam_is_the_searchs(ctc, s2s):
    searches = [Recognizer.from_folder(p, "cpu", beam_size=7).search for p in (ctc, s2s)]
    assert searches[0].pruning["beam_size"] == searches[1].beam_size == 7


def test_an_n_gram_joins_the_search(ctc, folder, tmp_path, monkeypatch, capsys):
    words = ["CAB", "DEAF", "FACE", "BED", "ABE"]  # BEAD is not among them
    lines = ["\\data\\", f"ngram 1={len(words) + 3}", "ngram 2=1", "", "\\1-grams:", "-9\t<unk>\t0"]
    lines += ["-99\t<s>\t0", "-1\t</s>\t0", *(f"-0.7\t{w}\t0" for w in words), ""]
    lines += ["\\2-grams:", "-0.7\tCAB DEAF", "", "\\end\\", ""]
    (tmp_path / "a.arpa").write_text("\n".join(lines))
    (tmp_path / "bad.arpa").write_text("\n".join(lines[:5]))
    refused = ["--lm", tmp_path / "bad.arpa", "--model", ctc]
    shown = call(monkeypatch, capsys, folder / "b.flac", *refused, status=2)
    assert "bad.arpa is no" in shown.err
    options = ["--lm", tmp_path / "a.arpa", "--lm-weight", 2, "--beam", 50, "--model", ctc]
    assert call(monkeypatch, capsys, folder / "b.flac", *options).out == f"{SENTENCES[1]}\n"
    search = Recognizer.from_folder(ctc, "cpu", lm=tmp_path / "a.arpa", lm_weight=2.0).search
    assert search.searcher.lm.alpha == 2.0


def test_help_teaches(monkeypatch, capsys):
    shown = call(monkeypatch, capsys, "--help").out
    for wanted in ("examples:", "--format srt", "pip install av", "exit status", "package.py"):
        assert wanted in shown
