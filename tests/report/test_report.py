"""python -m inference.report: numbers, comparisons, figures, and what it says of mistakes."""

import json
import re
import sys

import pytest

from inference.report import __main__ as script
from inference.report import analysis
from inference.report.alignments import Utterance
from inference.report.folder import Run, read_log
from tests.report.written import LOG, run_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three seeds of a configuration, and two of a worse one."""
    root = tmp_path_factory.mktemp("runs")
    ours = [run_folder(root / "ours" / str(s), s) for s in (1, 2, 3)]
    return ours, [run_folder(root / "theirs" / str(s), s, changes=0.6) for s in (4, 5)]


def call(monkeypatch, capsys, *words):
    """(exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    status = 0
    try:
        script.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_seeds_against_others(folders, monkeypatch, capsys):
    ours, theirs = folders
    _, out, _ = call(monkeypatch, capsys, ours[0].parent, "--against", *theirs, "--format", "json")
    found = json.loads(out)
    rates = found["rates"]
    heads = [re.match(r"%WER (\S+)", (f / "wer_test-clean.txt").read_text())[1] for f in ours]
    assert [f"{r:.2f}" for r in rates["WER"]["runs"]] == heads
    assert rates["WER"]["value"] == pytest.approx(sum(rates["WER"]["runs"]) / 3)
    difference = rates["WER, difference"]
    assert difference["value"] == pytest.approx(
        rates["WER"]["value"] - rates["WER of the others"]["value"]
    )
    assert difference["interval"][1] < 0  # twice as many errors are told apart
    total = found["tables"]["all"][0]
    for part in ("by speaker", "by length of the utterance", "words with the most errors"):
        rows = found["tables"][part]
        assert sum(r["errors"] for r in rows) == total["errors"]
    assert found["tables"]["most frequent errors"][0]["heard"] == "OH"
    assert {r["speaker"] for r in found["tables"]["by speaker"]} == {"100", "101", "102"}


def test_test_sets_that_not_all_have(folders, tmp_path, monkeypatch, capsys):
    ours, theirs = folders
    for name, sets in {"more": ("test-clean", "test-mine"), "other": ("test-theirs",)}.items():
        (tmp_path / name).mkdir()
        for test_set in sets:
            text = (ours[0] / "wer_test-clean.txt").read_text()
            (tmp_path / name / f"wer_{test_set}.txt").write_text(text)
    status, out, err = call(monkeypatch, capsys, tmp_path / "more", "--against", theirs[0])
    assert status == 0 and "test-clean" in out and "test-mine" not in out
    assert "left out: test-mine" in err
    status, out, err = call(monkeypatch, capsys, tmp_path / "more", "--against", tmp_path / "other")
    assert (status, out) == (2, "") and "no test set is in all of these folders" in err


def test_text_and_markdown(folders, monkeypatch, capsys):
    ours, _ = folders
    _, text, _ = call(monkeypatch, capsys, ours[0], "--top", 3)
    _, md, _ = call(monkeypatch, capsys, ours[0], "--top", 3, "--format", "md")
    for out in (text, md):
        assert all(word in out for word in ("40 utterances", "WER", "95 % interval", "orst utter"))
    assert len(re.findall(r"^\| 10\d \|", md, re.M)) == 3


def test_curves(folders, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    ours, _ = folders
    for name in ("a", "b"):
        call(monkeypatch, capsys, *ours, "--figures", tmp_path / name)
    svg = (tmp_path / "a/curves.svg").read_text()
    assert all(f">{word}<" in svg for word in ("epoch", "training", "dev", "WER", str(ours[0])))
    assert svg == (tmp_path / "b/curves.svg").read_text()


def test_mistakes_have_a_line(folders, tmp_path, monkeypatch, capsys):
    ours, _ = folders
    other = run_folder(tmp_path / "other", 9)
    text = (other / "wer_test-clean.txt").read_text()
    (other / "wer_test-clean.txt").write_text(text.replace("100-1-0000", "100-1-9999"))
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([tmp_path / "none"], "there is no folder"),
        ([tmp_path / "empty"], "holds no wer_<test set>.txt"),
        ([ours[0], "--test-set", "test-x"], "holds no wer_test-x.txt; it has test-clean"),
        ([ours[0], other], "other sentences in test-clean: 2 differ"),
        ([ours[0], "--top", "0"], "--top 0 must be at least 1"),
        ([ours[0], "--figures", other / "wer_test-clean.txt"], "is a file; give another --figures"),
    ):
        status, out, err = call(monkeypatch, capsys, *words)
        assert (status, out) == (2, "") and message in err and err.startswith("error: ")


def test_the_log(folders):
    epochs, tests = read_log(LOG)
    assert [e["epoch"] for e in epochs] == [1, 2, 3] and epochs[0]["valid WER"] == 99
    assert tests["test-clean"]["test CER"] == 3.7
    again = LOG + LOG.splitlines()[1].replace("60.00", "61.00") + "\nepoch: 4, lr: 1.0e-03, st"
    epochs, _ = read_log(again)
    assert [e["valid WER"] for e in epochs] == [99, 61, 40]
    # The mean of the two epochs that are averaged.
    assert Run(folders[0][0]).dev_rates() == {"WER": 50.0, "CER": 25.0}


def test_ids_without_a_speaker():
    assert analysis.by_speaker([[Utterance("utterance1", (("S", "A", "B"),))]]) is None
