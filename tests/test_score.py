"""score.py: a packaged model against folders and manifests, and what cannot be scored."""

import json
import shutil
import sys

import pytest
import soundfile as sf

import score as script
from inference.report.folder import Run
from tests.recipes import runs
from tests.recipes.packages import SENTENCES, hearing_package, said


@pytest.fixture(scope="module")
def package():
    return hearing_package()


@pytest.fixture
def data(tmp_path):
    """The sentences in LibriSpeech layout."""
    chapter = tmp_path / "test-mine/1/2"
    chapter.mkdir(parents=True)
    lines = []
    for i, text in enumerate(SENTENCES):
        sf.write(chapter / f"1-2-{i:04d}.flac", said(text), runs.RATE)
        lines.append(f"1-2-{i:04d} {text}\n")
    (chapter / "1-2.trans.txt").write_text("".join(lines))
    return tmp_path / "test-mine"


def run(monkeypatch, capsys, *arguments):
    """-> status, what is printed, errors"""
    words = ["score.py", *map(str, arguments), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        script.main()
    return end.value.code, *capsys.readouterr()


def test_rates_of_a_folder_and_of_a_manifest(data, package, tmp_path, monkeypatch, capsys):
    transcript = data / "1/2/1-2.trans.txt"
    words = SENTENCES[0].split()
    transcript.write_text(transcript.read_text().replace(SENTENCES[0], " ".join([*words, "NOT"])))
    rows = [
        {"audio_filepath": str(data / f"1/2/1-2-{i:04d}.flac"), "text": text, "id": f"u{i}"}
        for i, text in enumerate(SENTENCES)
    ]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scores"
    given = (data, manifest, "--model", package, "--output", output)
    status, printed, _ = run(monkeypatch, capsys, *given)
    total = sum(len(text.split()) for text in SENTENCES) + 1
    assert status == 0
    first, second = printed.splitlines()
    assert first.startswith(f"test-mine: WER {100 / total:.2f} [0.00, ")
    assert first.endswith(f"; {total} words in {len(SENTENCES)} utterances")
    assert second.startswith("rows: WER 0.00 [0.00, 0.00], CER 0.00 [0.00, 0.00]")
    kept = Run(output).test_sets  # as inference.report reads them
    assert kept.keys() == {"test-mine", "rows"}
    (wrong,) = [u for u in kept["test-mine"] if u.errors]
    assert wrong.id == "1-2-0000" and wrong.hypothesis == words


def test_what_cannot_be_used_is_named_and_the_rest_is_scored(data, package, monkeypatch, capsys):
    (data / "1/2/1-2-0001.flac").write_bytes(b"no audio")
    transcript = data / "1/2/1-2.trans.txt"
    lines = transcript.read_text().splitlines()
    lines[2] = lines[2].split()[0]
    lines[3] = lines[3].split()[0] + " " + SENTENCES[3].lower()
    transcript.write_text("\n".join(lines))
    status, printed, errors = run(monkeypatch, capsys, data, "--model", package)
    assert status == 1
    assert f"words in {len(SENTENCES) - 2} utterances" in printed
    spelling = len(SENTENCES[3].split())
    assert f"{spelling} errors are of capital and small letters alone" in printed
    assert "unreadable audio: 1" in errors and "1-2-0001.flac" in errors
    assert "empty text: 1" in errors and "1-2-0002.flac" in errors


def test_a_set_that_cannot_be_heard_costs_no_other(data, package, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    for flac in bad.rglob("*.flac"):
        flac.write_bytes(b"no audio")
    status, printed, errors = run(monkeypatch, capsys, bad, data, "--model", package)
    assert status == 1 and printed.startswith("test-mine: WER")
    assert "error: no recording of bad can be heard" in errors


def test_nothing_to_score(data, package, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, expected in {
        (empty,): "empty holds no utterance that can be scored",
        (tmp_path / "nothing",): "nothing is no folder, nor a manifest (.csv, .jsonl)",
        (data, data): "two test sets are called test-mine",
    }.items():
        status, printed, errors = run(monkeypatch, capsys, *given, "--model", package)
        assert (status, printed) == (2, "") and expected in errors and "Traceback" not in errors
    for flac in data.rglob("*.flac"):
        flac.write_bytes(b"no audio")
    status, printed, errors = run(monkeypatch, capsys, data, "--model", package)
    assert (status, printed) == (2, "") and "no recording of test-mine can be heard" in errors
