"""Synthesised speech at scale: layout, going on after a kill, what is refused, and sound."""

import json
import random
import signal
import subprocess
import sys
import time
from math import nan
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from demo import accents, espeak
from demo.acoustics import Conditions, Place
from demo.readers import draw_readers
from demo.synthesise import synthesise
from demo.texts import punctuate, read_texts, repeated
from librispeech_prepare import prepare_librispeech
from modules.errors import UserError

TEXT = """19-198-0000 NORTHANGER ABBEY
19-198-0001 THIS LITTLE WORK WAS FINISHED LONG AGO

He said: \u201cI don\u2019t know\u2014do you?\u201d
Chapter 3
the quick brown fox jumps over the lazy dog and then it goes home again
"""


@pytest.fixture
def voice():
    pytest.importorskip("espeakng_loader", reason="pip install -r requirements-demo.txt")
    return espeak.start()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments):
    command = [sys.executable, "-m", "demo.synthesise", *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)


def test_texts_are_cleaned_and_cut(text, capsys):
    texts = read_texts(text, 10)
    assert texts == [
        "NORTHANGER ABBEY",
        "THIS LITTLE WORK WAS FINISHED LONG AGO",
        "HE SAID I DON'T KNOW DO YOU",
        "THE QUICK BROWN FOX JUMPS OVER THE LAZY",
        "DOG AND THEN IT GOES HOME AGAIN",
    ]
    assert "left out: 1, as line 5: 'Chapter 3'" in capsys.readouterr().err
    drawn = repeated(texts)(random.Random(0), 12)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == sorted(texts) and len(drawn) == 12
    spoken = punctuate(texts[-1] + " AND AGAIN AND AGAIN", random.Random(1))
    assert "," in spoken and spoken.replace(",", "").upper().startswith(texts[-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\n \n", "holds no text"),
        (b"caf\xe9\n", "not UTF-8 at byte 3"),
        ("ПРИВЕТ\nМИР\nYES\n".encode(), "other characters .*: 2, most of it, as line 1"),
    ],
)
def test_useless_texts(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(path, 40)


def test_killed_run_goes_on(voice, text, tmp_path):
    out = tmp_path / "out"
    options = ("--text", text, "--hours", 0.1, "--speakers", 20)
    killed = run(out, *options, "--workers", 1)
    while killed.poll() is None and not any(out.glob("*.partial/*/1")):
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.partial/*/1/*")}
    assert kept and not (out / "synth-100").exists()
    last = run(out, *options, "--workers", 2)
    assert last.wait() == 0, last.stderr.read()
    last.stderr.close()
    assert not list(out.rglob("*.partial"))
    for path, written in kept.items():
        where = str(path).replace("synth-100.partial", "synth-100")
        assert Path(where).stat().st_mtime_ns == written
    info = {sf.info(file).samplerate for file in out.rglob("*.flac")}
    assert info == {16000}
    prepare_librispeech(out, tmp_path / "manifests", "synth-100", max_bad_fraction=0)
    seconds = sum(sf.info(file).duration for file in out.rglob("*.flac"))
    made = json.loads((out / "synth-100/synthesis.json").read_text())["hours"]
    assert made == pytest.approx(seconds / 3600, abs=0.01) == pytest.approx(0.1, rel=0.25)
    assert len((out / "synth-100/speakers.tsv").read_text().splitlines()) == 21


def test_splits_are_kept_or_refused(voice, tmp_path, capsys):
    options = {"digits": True, "hours": 0.01, "speakers": 3, "workers": 1}
    made = synthesise(tmp_path, "a", **options)
    assert synthesise(tmp_path, "a", **options) == pytest.approx(made, abs=0.01)
    assert "kept" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made by other options \(hours\)"):
        synthesise(tmp_path, "a", **(options | {"hours": 0.02}))
    with pytest.raises(UserError, match="more hours or fewer speakers"):
        synthesise(tmp_path, "b", **(options | {"speakers": 30}))
    synthesise(tmp_path, "b", **options)  # nothing had been said, so nothing is in the way
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    with pytest.raises(UserError, match="made by something else"):
        synthesise(tmp_path, "thesis", **options)
    # Speakers of two splits never share an id: the splits can be trained on together.
    prepare_librispeech(tmp_path, tmp_path, ["a", "b"], merge_lst=["a", "b"], merge_name="ab.csv")
    words = {w for line in (tmp_path / "ab.csv").read_text().splitlines()[1:] for w in line.split()}
    assert {"SEVEN", "ZERO"} <= words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either"),
        ({"digits": True, "split": "../up"}, "no name of a folder"),
        ({"digits": True, "speakers": 5000}, "speakers=5000"),
        ({"digits": True, "hours": float("nan")}, "hours=nan"),
        ({"digits": True, "hours": 1e9}, "MB free"),
        ({"digits": True, "foreign": 2}, "foreign=2"),
        ({"digits": True, "conditions": Conditions(reverb=-1)}, "reverb=-1"),
        ({"digits": True, "conditions": Conditions(snr=(9, 1))}, "lower ratio first"),
        ({"digits": True, "conditions": Conditions(snr=(nan, nan))}, "lower ratio first"),
    ],
)
def test_impossible_options(voice, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        synthesise(tmp_path, **({"split": "synth"} | options))


def test_wrong_command_line(tmp_path):
    refused = run(tmp_path, "--text", tmp_path / "absent.txt")
    _, err = refused.communicate()
    assert refused.returncode == 2 and err.startswith(b"error: ") and err.count(b"\n") == 1


def test_foreign_accents_are_heard(voice):
    voice.set_voice("en-us", "m3", 160, 50, 50)
    text = "well, the seven boats had judged them"
    phonemes = voice.phonemes(text)
    native = accents.pronounce(phonemes, ())
    assert len(voice.say(native)) == pytest.approx(len(voice.say(text)), rel=0.02)
    german = accents.pronounce(phonemes, [("w", "v"), ("D", "z"), ("d#", "t"), ("h", "")])
    assert german.startswith("[[v|'E|l]], [[z|@2 s|'E|v|@|n")
    assert german.endswith("|'V|dZ|t z|,E|m]]")


def test_every_accent_says_every_sound(voice):
    """eSpeak drops what comes after a phoneme that it does not know."""
    voice.set_voice("en-us", "m3", 160, 50, 50)
    least = 0.85 * len(voice.say("[[m|'i:|m|m|'i:|m]]"))
    rules = [rule.split(">") for text in accents.ACCENTS.values() for rule in text.split()]
    for sound in {new for _, new in rules if new}:
        assert len(voice.say(f"[[m|'i:|m|{sound}|m|'i:|m]]")) > least, sound
    assert len(voice.say("[[m|'i:|m|d.|m|'i:|m]]")) < least
    heard = voice.phonemes(
        "the thin vision judged where hot thieves who bought yellow azure cups were, red "
        "hotter gifts of wool sing about a chosen ruby fire, oil and good boats made of a little "
        "big car are there on shore, or were there more, and these were the other pens's "
        "robbed sloth's"
    )
    said = {p.strip(accents.STRESS) for clause in heard for w in clause for p in w.split("|")}
    assert {old.rstrip("#") for old, _ in rules} <= said


def test_readers_differ(voice):
    readers = draw_readers(random.Random(0), 400, 1000, 0.35)
    assert len({r.id for r in readers}) == 400 == len({r.seed for r in readers})
    assert len({r.variant for r in readers}) > 80
    assert {r.foreign for r in readers} == set(accents.ACCENTS)
    assert 0.25 < np.mean([r.foreign != "native" for r in readers]) < 0.45


@pytest.fixture(scope="module")
def speech():
    t = np.arange(2 * 22050) / 22050
    x = sum(np.sin(2 * np.pi * f * t) for f in range(200, 8000, 200))
    x[(t % 0.4) > 0.3] = 0
    return (0.05 * x).astype(np.float32)


def record(speech, seed=1, size=1.0, **conditions):
    clean = {"noise": 0, "reverb": 0, "band_limit": 0}
    return Place(3, 22050).record(
        speech, size, Conditions(**(clean | conditions)), np.random.default_rng(seed)
    )


def test_recordings_are_sound(voice, speech):
    x = record(speech, noise=1, reverb=1, band_limit=1)
    assert x.dtype == np.float32 and np.isfinite(x).all() and 0.04 < np.abs(x).max() < 1
    assert np.array_equal(x, record(speech, noise=1, reverb=1, band_limit=1))
    assert not np.array_equal(x[:9000], record(speech, 2, noise=1, reverb=1, band_limit=1)[:9000])
    assert len(record(speech)) / 16000 == pytest.approx(2.45, abs=0.4)
    assert len(record(speech, size=1.1)) == pytest.approx(1.1 * len(record(speech)), rel=0.025)


def test_conditions_are_heard(voice, speech):
    def power(x, low, high):
        spectrum = np.abs(np.fft.rfft(x)) ** 2
        frequencies = np.fft.rfftfreq(len(x), 1 / 16000)
        return spectrum[(frequencies > low) & (frequencies < high)].sum() / spectrum.sum()

    narrow = [power(record(speech, s, band_limit=1), 7400, 8000) for s in range(6)]
    wide = [power(record(speech, s), 7400, 8000) for s in range(6)]
    assert np.median(narrow) < 0.01 * np.median(wide)

    def floor(x):  # the quiet moments within speech, against its level
        frames = np.square(x[: len(x) // 160 * 160]).reshape(-1, 160).mean(1)[45:-45]
        return np.percentile(frames, 10) / frames.mean()

    clean = np.median([floor(record(speech, s)) for s in range(6)])
    assert np.median([floor(record(speech, s, noise=1, snr=(5, 5))) for s in range(6)]) > 0.03
    assert np.median([floor(record(speech, s, reverb=1)) for s in range(6)]) > 10 * clean
