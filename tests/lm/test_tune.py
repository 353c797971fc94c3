"""tune.py: encodes once, searches often, on the development set alone."""

import contextlib
import io
import re
import shutil
import types

import pytest
import torch

import tune
from modules import tuning
from modules.errors import UserError
from modules.lm import ngram
from tests.recipes import runs
from tests.recipes.packages import trained


def call(*arguments):
    with runs.own_logging(), contextlib.redirect_stdout(io.StringIO()) as printed:
        tune.run(tune.parser().parse_args([str(a) for a in arguments]))
    return printed.getvalue()


def rows(printed):
    """The table's numbers; None where there is no such weight."""
    lines = re.findall(r"^((?: +(?:-|-?[\d.]+)){2,3}(?: +[\d.]+){2})(?:  <)?$", printed, re.M)
    return [[None if x == "-" else float(x) for x in line.split()] for line in lines]


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arpa")
    (folder / "text.txt").write_text("CAB DEAF FACE\nBED ABE CAB\n")  # and no BEAD
    path = folder / "2-gram.arpa"
    ngram.main([str(folder / "text.txt"), "--order", "2", "--output", str(path)])
    return path


def test_ctc_weights(arpa, tmp_path, monkeypatch):
    run = trained("ctc")[0]
    before = runs.files_of(run)
    calls = []
    whole = tuning.encode
    monkeypatch.setattr(tuning, "encode", lambda *a: calls.append(1) or whole(*a))
    options = ["--lm_weight", "0.5,4", "--word_bonus", "0,1", "--token_prune_min_logp", "-6,-1"]
    printed = call(run, "--device", "cpu", "--save", tmp_path / "dev.pt", "--lm", arpa, *options)
    found = rows(printed)
    tried = [[0.5, 0], [0.5, 1], [4, 0], [4, 1]]
    expected = [[None] * 3, *([*pair, prune] for prune in (-6, -1) for pair in tried)]
    assert [row[:3] for row in found] == expected
    assert len(calls) == 1 and len({row[3] for row in found}) > 1
    best = min(found[1:], key=lambda row: row[3:])
    chosen = f"--no_lm False --kenlm_model_path {arpa} --lm_weight {best[0]} --word_bonus {best[1]}"
    assert f"{chosen} --token_prune_min_logp {best[2]}" in printed
    assert set(runs.files_of(run)) - set(before) <= {"env.log", "log.txt"}
    assert before.items() <= runs.files_of(run).items()
    again = call(run, "--device", "cpu", "--encoded", tmp_path / "dev.pt", "--lm", arpa, *options)
    assert rows(again) == found and len(calls) == 1

    # Its winner gives the test stage the same error rate.
    options = {"kenlm_model_path": arpa, "no_lm": False, "d_model": 32, "test_splits": "[dev]"}
    options |= dict(zip(("lm_weight", "word_bonus", "token_prune_min_logp"), best, strict=False))
    runs.train("CTC/conmamba_tiny.yaml", tmp_path / "run", skip_train=True, resume=run, **options)
    first = (tmp_path / "run/wer_dev.txt").read_text().split()
    assert float(first[1]) == pytest.approx(best[3], abs=0.006)


def test_a_folder_that_was_moved(tmp_path):
    shutil.copytree(trained("ctc")[0], tmp_path / "moved")
    with runs.own_logging():
        brain = tune.load(tmp_path / "moved", "cpu")
    assert brain.checkpointer.checkpoints_dir == tmp_path / "moved/save"


def test_the_runs_own_splits_are_not_questioned(tmp_path):
    """With --encoded nothing of them is read; and whoever validates on a part of training may."""
    splits = {"dev_splits": ["dev"], "train_splits": ["dev"], "test_splits": ["test"]}
    hparams = types.SimpleNamespace(**splits, output_folder=tmp_path)
    assert tune.split_names(None, hparams) == ["dev"]
    with pytest.raises(UserError, match="dev is what the run learnt from"):
        tune.split_names("dev", hparams)
    hparams.dev_splits = ["test"]
    with pytest.raises(UserError, match="test is a test set"):
        tune.split_names(None, hparams)


def test_s2s_weights(tmp_path):
    from tests.lm.test_train_lm import train

    run = trained("s2s")[0]
    tokenizer = run / "save/tokenizer.model"
    train("mamba", tmp_path / "lm", tokenizer_path=tokenizer, number_of_epochs=1)
    options = ["--lm_weight", "0.5,3", "--ctc_weight_decode", "0,0.5", "--utterances", 2]
    printed = call(run, "--device", "cpu", "--lm", tmp_path / "lm", *options)
    expected = [[w, c] for c in (0, 0.5) for w in (None, 0.5, 3)]
    assert [row[:2] for row in rows(printed)] == expected
    assert f"--no_lm False --pretrained_lm_tokenizer_path {tmp_path / 'lm'} --lm_weight" in printed
    (tmp_path / "lm/tokenizer.ckpt").write_bytes(b"another")
    with pytest.raises(UserError, match="speaks the units of"):
        call(run, "--device", "cpu", "--lm", tmp_path / "lm", *options)


def test_a_ctc_run_over_words(arpa, tmp_path):
    """Its tokenizer is loaded, and the test stage hears the same with an n-gram."""
    options = {"number_of_epochs": 1, "test_splits": "[dev]", "kenlm_model_path": arpa}
    options |= {"no_lm": False, "lm_weight": 1, "word_bonus": 0, "token_prune_min_logp": -6}
    runs.train("CTC/conmamba_digits_tiny.yaml", tmp_path, total_steps=11, **options)
    weights = ["--lm_weight", "1", "--word_bonus", "0", "--token_prune_min_logp", "-6"]
    *_, with_lm = rows(call(tmp_path, "--device", "cpu", "--lm", arpa, *weights))
    first = (tmp_path / "wer_dev.txt").read_text().split()
    assert float(first[1]) == pytest.approx(with_lm[3], abs=0.006)


def test_utterances_are_evenly_spread():
    assert tuning.spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert tuning.spread(list(range(10)), 6) == [0, 1, 3, 5, 6, 8]
    assert tuning.spread([1, 2], 5) == tuning.spread([1, 2], None) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LM", "--lm", "ARPA"], "is a run of train_LM.py"),
        (["nowhere"], "nowhere holds no hyperparams.yaml"),
        (["RUN", "--lm", "ARPA", "--splits", "test-a"], "test-a is a test set"),
        (
            ["RUN", "--lm", "ARPA", "--splits", "elsewhere"],
            "the run has no .*elsewhere.csv",
        ),
        (["RUN", "--lm", "ARPA", "--splits", ""], "the run has no"),
        (["RUN", "--lm", "ARPA", "--splits", "dev, train"], "train is what the run learnt from"),
        (["RUN", "--lm", "."], "this run searches with a word n-gram"),
        (["RUN", "--lm", "ARPA", "--ctc_weight_decode", "0.3"], "no meaning for a CTC run"),
        (["RUN", "--lm", "ARPA", "--token_prune_min_logp", "4"], "logp 4 is the logarithm of a"),
        (["RUN", "--lm", "ARPA", "--encoded", "no.pt"], "no.pt is no file"),
        (["RUN", "--lm", "ARPA", "--encoded", "BAD"], "is not what --save writes"),
        (["RUN", "--lm", "ARPA", "--encoded", "WIDE"], "of a model of another size"),
        (["RUN", "--lm", "ARPA", "--encoded", "OTHER"], "of other weights than .* has now"),
        (["RUN", "--lm", "ARPA", "--save", "/no/such/dev.pt"], "there is no such folder"),
        (["RUN", "--save", "RUN"], "is a folder; give the name of a file"),
        (["YAML", "--lm", "ARPA"], "lacks the key skip_train, so it is not what a training wrote"),
        (["RUN"], "give --lm"),
    ],
)
def test_mistakes_are_told(arpa, tmp_path, arguments, message):
    torch.save({"x": []}, tmp_path / "bad.pt")
    other = {"x": [torch.zeros(3, 31)], "texts": ["CAB"], "joint": False, "head": "another"}
    torch.save(other, tmp_path / "other.pt")
    torch.save(other | {"x": [torch.zeros(3, 99)]}, tmp_path / "wide.pt")
    run = tmp_path / "run"
    shutil.copytree(trained("ctc")[0], run)
    manifest = (run / "dev.csv").read_text()
    (run / "gone.csv").write_text(manifest.replace(str(runs.corpus()), "/gone"))
    (tmp_path / "lm").mkdir()
    shutil.copyfile(runs.ROOT / "hparams/LM/mamba.yaml", tmp_path / "lm/hyperparams.yaml")
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/hyperparams.yaml").write_text("seed: 1\n")
    places = {"LM": tmp_path / "lm", "RUN": run, "ARPA": arpa, "BAD": tmp_path / "bad.pt"}
    places |= {"WIDE": tmp_path / "wide.pt", "OTHER": tmp_path / "other.pt"}
    places["YAML"] = tmp_path / "yaml"
    with pytest.raises(UserError, match=message):
        call(*[places.get(a, a) for a in arguments])
