"""The demo corpus: layout, separate splits, and what happens to the folder it is written to."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile as sf

from demo.espeak import start
from demo.make_corpus import make_corpus
from demo.sentences import split_sentences
from demo.speakers import ACCENTS, VARIANTS
from librispeech_prepare import prepare_librispeech
from modules.errors import UserError

TINY = {"speakers": 2, "utterances": 4, "eval_speakers": 1, "eval_utterances": 2, "workers": 1}


@pytest.fixture
def espeak():
    pytest.importorskip("espeakng_loader", reason="pip install -r requirements-demo.txt")
    return start()


def test_corpus_can_be_prepared(espeak, tmp_path):
    seconds = make_corpus(tmp_path / "demo", **(TINY | {"workers": 2}))
    assert list(seconds) == ["train-clean-100", "dev-clean", "test-clean", "test-other"]
    assert not (tmp_path / "demo.partial").exists()
    files = sorted((tmp_path / "demo").rglob("*.flac"))
    assert len(files) == 10
    for file in files:
        info = sf.info(file)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert 0.01 < abs(sf.read(file)[0]).max() < 1
    prepare_librispeech(
        tmp_path / "demo", tmp_path, "train-clean-100", "dev-clean", max_bad_fraction=0
    )
    assert len((tmp_path / "train-clean-100.csv").read_text().splitlines()) == 5


def test_corpus_is_kept_replaced_or_refused(espeak, tmp_path, capsys):
    make_corpus(tmp_path / "demo", **TINY)
    marker = tmp_path / "demo/demo_corpus.json"
    before = marker.stat().st_mtime_ns
    make_corpus(tmp_path / "demo", **TINY)
    assert "kept" in capsys.readouterr().out and marker.stat().st_mtime_ns == before
    next((tmp_path / "demo").rglob("*.flac")).unlink()
    (tmp_path / "demo.partial").mkdir()  # as a killed run leaves it
    (tmp_path / "demo.partial/demo_corpus.json").write_text("{")
    make_corpus(tmp_path / "demo", **TINY)
    assert marker.stat().st_mtime_ns != before
    make_corpus(tmp_path / "demo", **(TINY | {"seed": 1}))
    assert json.loads(marker.read_text())["config"]["seed"] == 1

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    with pytest.raises(UserError, match="is not a demo corpus"):
        make_corpus(tmp_path / "thesis", **TINY)
    assert (tmp_path / "thesis/chapter.tex").exists()


def test_killed_run_leaves_nothing_under_the_name(espeak, tmp_path):
    command = [sys.executable, "-m", "demo.make_corpus", tmp_path / "demo", "--workers", "1"]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    while run.poll() is None and not any(tmp_path.glob("demo.partial/*/*/*/*.flac")):
        time.sleep(0.1)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "demo").exists()
    make_corpus(tmp_path / "demo", **TINY)
    assert len(list((tmp_path / "demo").rglob("*.flac"))) == 10


def test_every_voice_exists(espeak):
    assert set(ACCENTS) <= espeak.accents()
    assert {v for names in VARIANTS.values() for v in names.split()} <= espeak.variants


@pytest.mark.parametrize(("accent", "variant"), [("en-nowhere", "f1"), ("en-us", "nobody")])
def test_unknown_voice(espeak, accent, variant):
    with pytest.raises(UserError, match=r"is unknown to eSpeak; choose .*(en-us|m8)"):
        espeak.set_voice(accent, variant, 160, 50, 50)


def test_voice_settings_are_heard(espeak):
    espeak.set_voice("en-us", "f1", 120, 50, 50)
    slow = espeak.say("seven three nine")
    espeak.set_voice("en-us", "f1", 200, 50, 50)
    assert len(espeak.say("seven three nine")) < 0.8 * len(slow)


def test_splits_share_neither_voices_nor_sentences():
    voices = [v for names in VARIANTS.values() for v in names.split()]
    assert len(voices) == len(set(voices))
    sizes = {"train": 2000, "dev": 100, "test": 100}
    lines = split_sentences(random.Random(0), sizes, digit_fraction=0.4)
    assert {split: len(texts) for split, texts in lines.items()} == sizes
    assert not set(lines["train"]) & set(lines["test"])
    assert not set(lines["dev"]) & (set(lines["test"]) | set(lines["train"]))
    words = {word for texts in lines.values() for text in texts for word in text.split()}
    assert 50 <= len(words) <= 65


def test_missing_package_is_named(monkeypatch, tmp_path):
    start.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-demo\.txt"):
        make_corpus(tmp_path / "demo", **TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"speakers": 5}, {"eval_speakers": 0}, {"digit_fraction": 2}, {"eval_utterances": 5000}],
)
def test_impossible_options(tmp_path, options):
    with pytest.raises(UserError, match=r"expected at least|not between|at most"):
        make_corpus(tmp_path / "demo", **(TINY | options))
