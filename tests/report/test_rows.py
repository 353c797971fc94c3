"""Rows come from folders alone, and their commands make the very settings that ran."""

import json
import shlex
import sys

import pytest
import yaml
from hyperpyyaml import resolve_references

from inference.report import rows as script
from inference.report.commands import command_of
from inference.report.folder import Run
from inference.report.results import read_results, write_results
from modules.options import read_options, top_level
from tests.recipes.runs import ROOT
from tests.report.written import run_folder

PLAIN = {"lr_model": 3e-4, "train_splits": ["a", "b"], "dropout": 0.0, "precision": "fp32"}
OBJECTS = {
    "normalize": {"norm_type": "sentence"},
    "fea_augment": {"augment_prob": 0.0},
    "n_mels": 40,  # others follow from it
    "resume": "start/here",
    "alphabet": "'ABC $é",
}


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["rows", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        script.main()
    return end.value.code, *capsys.readouterr()


def resolved(path, overrides):
    with open(path) as f:
        return resolve_references(f, overrides).read()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("CTC/conformer_large", PLAIN), ("CTC/conmamba_small", OBJECTS),
     ("S2S/conmambamamba_small", PLAIN | OBJECTS)],
)  # fmt: skip
def test_a_command_makes_the_settings_that_ran(name, changes, tmp_path):
    path = ROOT / f"hparams/{name}.yaml"
    changes = {k: v for k, v in changes.items() if k in top_level(path)}
    run = Run(run_folder(tmp_path / "run", 7, f"{name}.yaml", **changes))
    command, problems = command_of(run)
    assert problems == []
    words = shlex.split(command)
    assert words[:3] == ["python", f"train_{name[:3]}.py", f"hparams/{name}.yaml"]
    places = {"{data}/digits": "/data/of/digits", "{seed}": "7", "{output}": str(run.path)}
    given = [places.get(word, word) for word in words[2:]]
    _, overrides = read_options(given, top_level(path))
    ran = (run.path / "hyperparams.yaml").read_text().partition("\n")[2]
    assert content(resolved(path, overrides)) == content(ran)
    # And no word more than it takes.
    assert len(words) == 3 + 2 * (3 + len({"avg_checkpoints", *changes} - unchanged(path, changes)))


def content(text):
    return yaml.serialize(yaml.compose(text))


def unchanged(path, changes):
    defaults = top_level(path)
    return {k for k, v in changes.items() if v == defaults[k]}


def test_what_no_option_makes_is_told(tmp_path):
    folder = run_folder(tmp_path / "run", 1)
    text = (folder / "hyperparams.yaml").read_text()
    text = text.replace("modules.mamba.BiMamba", "my.Mixer").replace("blank_index: 0", "mine: 1", 1)
    (folder / "hyperparams.yaml").write_text(text)
    _, problems = command_of(Run(folder))
    assert "encoder is not the recipe's, and no option makes it so" in problems
    assert problems[-2:] == ["the recipe knows no key mine", "the run knows no key blank_index"]


def test_the_summary_tells_more(tmp_path):
    folder = run_folder(tmp_path / "run", 1)
    with open(folder / "summary.txt", "a") as f:
        f.write(
            "command      python train_CTC.py /x/hparams/CTC/conmamba_small.yaml "
            "--data_folder=/a/digits --seed 1 --output_folder out --compile\n"
            "commit       1234567\nhardware     NVIDIA H200\ntime         3.5 min\n"
        )
    args = script.parser().parse_args(
        [str(folder), "--table", "t", "--name", "n", "--figure", "digits:New"]
    )
    row = script.row_of("n", [Run(folder)], [], args)
    assert row["commands"] == [
        "python train_CTC.py hparams/CTC/conmamba_small.yaml --data_folder {data}/digits "
        "--seed {seed} --output_folder {output} --compile"
    ]
    assert row["figure"] == {"corpus": "digits", "model": "New"}
    (run,) = row["runs"]
    assert [run[k] for k in ("commit", "hardware", "minutes")] == ["1234567", "NVIDIA H200", 3.5]
    # That of an evaluation says nothing of the training.
    text = (folder / "summary.txt").read_text()
    (folder / "summary.txt").write_text(text.replace("--compile", "--skip_train True"))
    assert "hardware" not in Run(folder).summary


def test_rows_are_added_and_replaced(tmp_path, monkeypatch, capsys):
    for name, changes in (("base", 0.5), ("better", 0.2)):
        for seed in (2, 10):
            run_folder(tmp_path / "runs" / name / str(seed), seed, changes=changes, dropout=changes)
    broken = tmp_path / "runs/broken/1"
    run_folder(broken, 1)
    text = (broken / "wer_test-clean.txt").read_text()
    (broken / "wer_test-clean.txt").write_text(text[: len(text) // 2])
    results = tmp_path / "results.json"
    write_results({"tables": [], "rows": []}, results)
    command = [
        *sorted((tmp_path / "runs").iterdir()),
        *("--each", "--table", "ablations", "--commit", "abc1234", "--hardware", "NVIDIA H200"),
        *("--minutes", 2, "--against", tmp_path / "runs/base", "--add", "--results", results),
    ]
    for _ in range(2):  # again: the same rows
        status, out, err = call(monkeypatch, capsys, *command)
        assert status == 1 and "wrote 2 rows" in out
        assert "error: broken: " in err and "the file ends before" in err
        base, better = read_results(results)["rows"]
    assert [r["seed"] for r in better["runs"]] == [2, 10]
    assert better["commands"][0].endswith("--avg_checkpoints 2 --dropout 0.2")
    assert better["runs"][0] | {"test": None} == {
        **{"seed": 2, "commit": "abc1234", "hardware": "NVIDIA H200", "steps": 30},
        **{"minutes": 2.0, "dev": {"WER": 50.0, "CER": 25.0}, "test": None},
    }
    assert "against" not in base
    difference = better["against"]["test-clean"]["WER"]
    assert difference["difference"] < 0 and difference["interval"][1] < 0
    low, high = better["intervals"]["test-clean"]["WER"]
    assert low < sum(r["test"]["test-clean"]["WER"] for r in better["runs"]) / 2 < high


def test_of_folders_that_are_all_wrong_one_line_tells_each(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    results = tmp_path / "results.json"
    write_results({"tables": [], "rows": []}, results)
    before = results.read_text()
    words = [tmp_path / "empty", tmp_path / "gone", "--each", "--table", "t", "--add"]
    status, out, err = call(monkeypatch, capsys, *words, "--results", results)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"error: no row can be made: empty: {tmp_path / 'empty'} holds no wer_")
    assert f"; gone: there is no folder {tmp_path / 'gone'}" in err
    assert results.read_text() == before


def test_mistakes_have_a_line(tmp_path, monkeypatch, capsys):
    one, two = (run_folder(tmp_path / n, 1, dropout=d) for n, d in (("one", 0.1), ("two", 0.2)))
    other = run_folder(tmp_path / "other", 2, dropout=0.3)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "wer_test-clean.txt").write_text((one / "wer_test-clean.txt").read_text())
    for words, message in (
        ([one], "give --name for one row, or --each"),
        ([one, two, "--name", "n"], "a seed is there twice: 1, 1"),
        ([one, other, "--name", "n"], "are no seeds of one configuration"),
        ([bare, "--name", "n"], "does not tell its seed"),
        ([one, "--name", "n", "--figure", "x"], "--figure x must be CORPUS:MODEL"),
        ([one, "--name", "n", "--replace", "x"], "--replace x must be OLD=NEW"),
        ([one, "--name", "n", "--command", "python x.py"], "--command must hold {output}"),
    ):
        status, out, err = call(monkeypatch, capsys, *words, "--table", "t")
        assert (status, out) == (2, "") and message in err


def test_a_row_without_an_output_is_refused(tmp_path):
    row = {"table": "t", "name": "n", "commands": ["python x.py"], "runs": []}
    (tmp_path / "r.json").write_text(json.dumps({"tables": [{"name": "t"}], "rows": [row]}))
    with pytest.raises(script.UserError, match=r"its last command must write to \{output\}"):
        read_results(tmp_path / "r.json")
