"""docs/results.json: what it shows, and that its rows run: reproduce.py on a run of its own."""

import json
import shlex
import sys

import pytest

import reproduce as script
from inference.report import rows
from inference.report.folder import Run
from inference.report.rerun import compare, compare_means, filled
from inference.report.results import put_row, read_results, write_results
from inference.report.tables import markdown, shared_options, write_tables
from modules.errors import UserError
from tests.recipes import runs
from tests.recipes.packages import trained
from tests.report.written import wer_text
from tests.test_docs import faults

RESULTS = read_results()


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        script.main()
    return end.value.code


# ---- The page ----


def test_the_page_is_current(monkeypatch, capsys):
    assert call(monkeypatch, "--check-docs") == 0, "run python reproduce.py --write-docs"


@pytest.mark.parametrize("row", RESULTS["rows"], ids=lambda r: f"{r['table']}-{r['name']}")
def test_every_command_names_what_exists(row):
    for run in row["runs"]:
        for words in filled(row, run["seed"], "data", "out"):
            assert not faults(words)
            assert not any("{" in word and "}" in word and ":" not in word for word in words)


def test_a_table_without_a_place_is_named():
    more = {**RESULTS, "tables": [*RESULTS["tables"], {"name": "new", "test_sets": []}]}
    page = script.PAGE.read_text()
    with pytest.raises(UserError, match="no place for new; add\n<!-- table new: "):
        write_tables(page, more)


def test_a_table_shows_means_intervals_and_each_seed():
    def row(name, option, rates, **more):
        commands = [f"python train_CTC.py h.yaml --output_folder {{output}} --a 1{option}"]
        found = [
            {"seed": i, "commit": "c", "hardware": "H", "steps": 1000, "minutes": 2.5,
             "dev": {"WER": r + 1}, "test": {"t": {"WER": r, "CER": r / 2}}}
            for i, r in enumerate(rates)
        ]  # fmt: skip
        return {"table": "x", "name": name, "commands": commands, "runs": found, **more}

    against = {"t": {"WER": {"difference": -4.0, "interval": [-6.0, -2.0]}}}
    results = {
        "tables": [{"name": "x", "title": "X", "test_sets": ["t"]}],
        "rows": [
            row("base", "", [20.0, 24.0]),
            row("new", " --b 2", [18.0], intervals={"t": {"WER": [16.0, 20.5]}}, against=against),
        ],
    }
    text = markdown(results, "x")
    assert shared_options(results["rows"]) == [("--output_folder", "{output}"), ("--a", "1")]
    assert "| 1. base | `train_CTC.py h.yaml` | 23.0 | **22.00**, 11.00 | - |" in text
    assert "**18.00** [16.00, 20.50], 9.00 | -4.00 [-6.00, -2.00] | 0: 19.0, 18.00 / 9.00" in text
    assert "`train_CTC.py h.yaml --b 2`" in text and "| 1,000 | 2.5 | c, H |" in text


# ---- Running again ----


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A results.json with one row, of a run of this machine."""
    path = tmp_path_factory.mktemp("results") / "results.json"
    args = rows.parser().parse_args(["folder", "--table", "tones", "--name", "tones"])
    row = rows.row_of("tones", [Run(trained("ctc")[0])], [], args)
    results = {"tables": [], "rows": []}
    put_row(results, row)
    write_results(results, path)
    return path


def test_paths_are_those_of_where_it_is_called(written, tmp_path, monkeypatch, capsys):
    options = ["--results", written, "--table", "tones", "--dry-run", "--output", "out"]
    for folder, shown in ((tmp_path, f"{tmp_path}/out/tones/1/"), (runs.ROOT, " out/tones/1/")):
        monkeypatch.chdir(folder)
        assert call(monkeypatch, *options) == 0
        assert f"--output_folder {shown.strip()}" in capsys.readouterr().out


def test_a_row_runs_again_and_agrees(written, tmp_path, monkeypatch, capfd):
    (row,) = read_results(written)["rows"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [
        *("--results", written, "--table", "tones", "--row", 1, "--output", tmp_path),
        *("--data_folder", runs.corpus(), "--", "--device", "cpu"),
    ]
    status = call(monkeypatch, *command)
    out = capfd.readouterr().out
    (run,) = row["runs"]
    for name, rates in run["test"].items():
        # The same code, seed and machine: the same rate.
        text = f"seed {run['seed']}, {name} WER: {rates['WER']:.2f}, written {rates['WER']:.2f}; "
        assert text + "within the 95 % interval" in out
    assert status == 0 and "with --device cpu, which the row has not" in out


def test_what_lies_outside_is_told(written):
    (row,) = read_results(written)["rows"]
    seed, test = row["runs"][0]["seed"], row["runs"][0]["test"]
    low, high = test["test-a"]["WER_interval"]
    rates = {name: {"WER": r["WER"], "CER": r["CER"]} for name, r in test.items()}
    rates["test-a"]["WER"] = high + 0.1
    told = list(compare(row, seed, rates))
    assert [agrees for _, agrees in told].count(False) == 1
    assert f"OUTSIDE the 95 % interval {low:.2f} to {high:.2f}" in told[0][0]
    del test["test-b"]["WER_interval"], rates["test-a"]
    told = dict(compare(row, seed, rates))
    assert next(t for t, agrees in told.items() if agrees is False).endswith("has none")
    assert next(t for t, agrees in told.items() if agrees is None).endswith("they agree")


def test_means_without_a_test_set_of_some_seed():
    """`compare` has told of it; the other test set's mean is told still."""
    rates = {"a": {"WER": 10.0}, "b": {"WER": 20.0}}
    row = {"runs": [{"seed": seed, "test": rates} for seed in (1, 2)]}
    row["intervals"] = {name: {"WER": [5.0, 25.0]} for name in rates}
    told = list(compare_means(row, {1: rates, 2: {"b": {"WER": 21.0}}}))
    assert told == [
        ("all seeds, b WER: 20.50, written 20.00; within the 95 % interval 5.00 to 25.00", True)
    ]


def test_seeds_of_which_not_all_is_written():
    """Nothing ends a comparison after the training: what can be told is."""
    runs = [{"seed": 1, "test": {"a": {"WER": 10.0, "CER": 5.0}}},
            {"seed": 2, "test": {"a": {"WER": 12.0}}}]  # fmt: skip
    row = {"runs": runs, "intervals": {"a": {"WER": [9.0, 13.0], "CER": [4.0, 6.0]}}}
    now = {"a": {"WER": 11.0, "CER": 5.0}}
    told = [text for text, _ in compare(row, 1, now)]
    assert told[0].endswith("within the row's seeds, 10.00 to 12.00")
    assert told[1].endswith("one seed and no interval, so no telling whether they agree")
    assert [text.partition(":")[0] for text, _ in compare_means(row, {1: now, 2: now})] == [
        "all seeds, a WER"
    ]


def test_a_seed_is_told_of_before_the_next_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(
        "import pathlib, shutil, sys\n"
        "here, seed, output = map(pathlib.Path, sys.argv)\n"
        "assert str(seed) == '1'\n"
        "output.mkdir(parents=True)\n"
        "shutil.copy(here.with_name('wer_a.txt'), output)\n"
    )
    (tmp_path / "wer_a.txt").write_text(wer_text([("x-1", ["A", "B"], ["A", "C"])]))
    keys = {"commit": None, "hardware": None, "steps": 1, "minutes": None, "dev": {}}
    written = [{"seed": s, **keys, "test": {"a": {"WER": 50.0}}} for s in (1, 2)]
    commands = [f"python {shlex.quote(str(tmp_path / 'train.py'))} {{seed}} {{output}}"]
    row = {"table": "t", "name": "n", "commands": commands, "runs": written}
    path = tmp_path / "results.json"
    write_results(
        {"tables": [{"name": "t", "title": "T", "test_sets": ["a"]}], "rows": [row]}, path
    )
    command = ("--results", path, "--table", "t", "--output", tmp_path / "out")
    assert call(monkeypatch, *command) == 2
    assert "seed 1, a WER: 50.00, written 50.00; within" in capsys.readouterr().out


def test_seeds_are_known_before_anything_runs(monkeypatch, capsys):
    command = ("--table", "digits", "--dry-run", "--seed")
    assert call(monkeypatch, *command, 3402) == 0
    out = capsys.readouterr().out.splitlines()
    left_out = [line for line in out if line.startswith("# left out, --seed 3402: row")]
    assert left_out and out[: len(left_out)] == left_out
    rows = sum(row["table"] == "digits" for row in RESULTS["rows"])
    assert sum(line.startswith("# digits, row ") for line in out) == rows - len(left_out)
    assert call(monkeypatch, *command, 5) == 2
    assert "no row of digits has these" in capsys.readouterr().err


def test_dry_run_and_list_run_nothing(monkeypatch, capsys, tmp_path):
    command = ("--table", "digits", "--row", 1, "--dry-run", "--output", tmp_path / "out")
    assert call(monkeypatch, *command, "--data_folder", "/x/digits", "--seed", 3402) == 0
    heading, line = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert heading.startswith("# digits, row 1: ")
    assert words[words.index("--data_folder") + 1] == "/x/digits"
    assert words[words.index("--output_folder") + 1] == str(tmp_path / "out/digits/1/3402")
    assert words[words.index("--normalize") + 1] == "{norm_type: sentence}"
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, "--list") == 0
    listed = capsys.readouterr().out
    assert all(row["name"] in listed for row in RESULTS["rows"])


def test_mistakes_have_a_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"tables": [], "rows": [{"table": "t"}]}))
    for words, message in (
        ([], "give --table NAME, --list or --write-docs"),
        (["--table", "letters"], "there is no table 'letters'; there are digits"),
        (["--table", "digits", "--row", 99], "--row 99: digits has rows 1 to"),
        (["--table", "digits", "--row", 1, "--seed", 5], "--seed 5: row 1 has 3402"),
        (["--results", tmp_path / "none.json", "--list"], "cannot be read"),
        (["--results", tmp_path / "bad.json", "--list"], "is not as inference/report/results.py"),
    ):
        assert call(monkeypatch, *words) == 2
        assert message in capsys.readouterr().err
