"""Splits that are CSV or JSON-lines manifests in place of folders."""

import csv
import json

import numpy as np
import pytest
import soundfile as sf

from librispeech_prepare import prepare_librispeech
from modules.errors import UserError


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def audio(tmp_path):
    (tmp_path / "data/clips").mkdir(parents=True)
    tone = 0.1 * np.sin(np.arange(32000) / 10)
    sf.write(tmp_path / "data/clips/a.wav", tone[:16000], 16000)
    sf.write(tmp_path / "data/clips/b.flac", tone, 16000)
    return tmp_path / "data"


def write_jsonl(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))


def test_jsonl_manifest(audio, tmp_path, caplog):
    write_jsonl(
        audio / "train.jsonl",
        {"audio_filepath": "clips/a.wav", "text": "HELLO", "duration": 7.0},
        {"wav": "{data_root}/clips/b.flac", "wrd": "YOU", "ID": "b", "spk_id": "s1"},
    )
    prepare_librispeech(audio, tmp_path / "save", ["train"], [], [], None, ["train"], "train.csv")
    a, b = rows(tmp_path / "save/train.csv")[::-1]
    assert (a["ID"], a["wav"], a["duration"]) == ("clips-a", str(audio / "clips/a.wav"), "1.0")
    assert (b["ID"], b["duration"], b["spk_id"], b["wrd"]) == ("b", "2.0", "s1", "YOU")
    assert "clips-a: the manifest says 7.0 s" in caplog.text


def test_csv_manifest_and_its_own_output(audio, tmp_path):
    text = 'ID,wav,wrd\nx,clips/a.wav,"HELLO, YOU"\ny, $data_root/clips/b.flac,BYE\n'
    (audio / "train.csv").write_text(text, encoding="utf-8-sig")
    prepare_librispeech(audio, tmp_path / "save", ["train"])
    assert [(r["ID"], r["wrd"]) for r in rows(tmp_path / "save/train.csv")] == [
        ("x", "HELLO, YOU"),
        ("y", "BYE"),
    ]
    prepare_librispeech(tmp_path / "save", tmp_path / "again", ["train"])  # reads its own output
    with pytest.raises(UserError, match="would overwrite the input"):
        prepare_librispeech(audio, audio, ["train"])


def test_manifest_faults_of_content(audio, tmp_path):
    lines = [
        "ID,wav,wrd",
        "x,clips/a.wav,A",
        "x,clips/b.flac,B",
        "z,clips/no.wav,C",
        "e,clips/a.wav,",
    ]
    (audio / "train.csv").write_text("\n".join(lines))
    with pytest.raises(UserError):
        prepare_librispeech(audio, tmp_path, ["train"])
    for count in ("duplicate id: 2", "text without audio: 1", "empty text: 1"):
        assert count in (tmp_path / "prepare_report.txt").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", b"ID,audio_file,wrd\nx,a,b", r"t\.csv:1: no column wav"),
        ("t.csv", b"ID,wav,wrd\nx,a.wav,HI,THERE", r"t\.csv:2: 4 fields"),
        ("t.csv", b'ID,wav,wrd\nx,a.wav,"HI', r"t\.csv:2: .*quotes"),
        ("t.csv", b"ID,wav,wrd\nx,a.wav,H\xc9", r"t\.csv:2: not UTF-8"),
        ("t.csv", b"ID,wav,wrd,duration\nx,a.wav,HI,long", r"t\.csv:2: duration='long'"),
        ("t.jsonl", b'{"wav": "a.wav", "text": "A"}\n{"wav": ', r"t\.jsonl:2: not JSON"),
        ("t.jsonl", b'["a.wav"]', r"t\.jsonl:1: list, not an object"),
        ("t.jsonl", b'{"wav": "a.wav"}', r"t\.jsonl:1: no wrd or text"),
        ("t.jsonl", b'{"wav": "", "text": "A"}', r"t\.jsonl:1: the audio path is empty"),
        ("t.jsonl", b'{"wav": "a", "text": "A", "offset": 3}', r"t\.jsonl:1: offset=3"),
    ],
)
def test_manifest_faults_of_form(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        prepare_librispeech(tmp_path, tmp_path / "save", ["t"])
