"""train_LM.py: training, resuming, and its folder in an S2S run, a package and transcribe.py."""

import contextlib
import io
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train_LM
import transcribe
from inference import Recognizer
from inference.package import package
from modules.checkpoints import Checkpointer
from modules.errors import Stopped, UserError
from modules.language_model import load_language_model
from modules.lm.brain import LMBrain
from tests.lm.test_ngram_package import texts
from tests.recipes import runs
from tests.recipes.packages import RECIPES, trained
from tests.test_exact_resume import assert_identical, saved

TINY = {
    "precision": "fp32",
    "device": "cpu",
    "d_model": 16,
    "d_ffn": 16,
    "num_layers": 1,
    "dropout": 0.1,
    "output_neurons": 10,
    "token_type": "char",
    "number_of_epochs": 2,
    "max_batch_tokens": 100,
    "num_buckets": 4,
    "n_warmup_steps": 10,
    "lr_model": 1.0e-2,
    "avg_checkpoints": 2,
}
KINDS = {"mamba": {"d_state": 4}, "transformer": {"nhead": 2}}


def arguments(kind, folder, **overrides):
    data = runs.corpus()
    values = TINY | KINDS[kind] | {"train_text": f"[{data}/train]", "dev_text": f"[{data}/dev]"}
    values |= {"output_folder": folder} | overrides
    return [str(runs.ROOT / f"hparams/LM/{kind}.yaml"), *(f"--{k}={v}" for k, v in values.items())]


def train(kind, folder, **overrides):
    """A whole run in this process; returns what it printed."""
    with runs.own_logging(), contextlib.redirect_stdout(io.StringIO()) as printed:
        train_LM.main(arguments(kind, folder, **overrides))
    return printed.getvalue()


@pytest.fixture(scope="module")
def units():
    """The tokenizer of the S2S model that the language models join."""
    return trained("s2s")[0] / "save/tokenizer.model"


@pytest.fixture(scope="module", params=KINDS)
def lm(request, units, tmp_path_factory):
    """A language model's (kind, folder, summary)."""
    folder = tmp_path_factory.mktemp("lm") / request.param
    return request.param, folder, train(request.param, folder, tokenizer_path=units)


def test_it_learns_and_says_how_well(lm, units):
    _, folder, printed = lm
    epochs = runs.log_lines(folder)
    assert len(epochs) == 2 and epochs[-1]["valid PPL"] < epochs[0]["valid PPL"] < 20
    assert (folder / "tokenizer.ckpt").read_bytes() == units.read_bytes()
    token, word = map(float, re.search(r"dev +\d+ +(\S+) +(\S+)", printed).groups())
    assert 1 < token < 12 < word
    assert re.search(r"commit +\S+\nhardware +.+\ntime +[\d.]+ min\n", printed)
    average = load_language_model(None, folder)
    tokens = torch.randint(3, 10, (2, 7))
    assert average(tokens).shape == (2, 7, 10)


@pytest.mark.parametrize("kind", ["mamba", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_bit(kind, tmp_path, monkeypatch):
    options = {"grad_accumulation_factor": 2, "num_workers": int(kind == "mamba")}
    train(kind, tmp_path / "straight", **options)
    whole, seen = LMBrain.fit_batch, []

    def fit_batch(self, batch):
        seen.append(1)
        if len(seen) == 5:
            self.stop_request.name = "SIGTERM"
        return whole(self, batch)

    monkeypatch.setattr(LMBrain, "fit_batch", fit_batch)
    with pytest.raises(Stopped):
        train(kind, tmp_path / "run", **options)
    assert not (tmp_path / "run/lm.ckpt").exists()
    train(kind, tmp_path / "run", **options)
    assert_identical(saved(tmp_path / "run"), saved(tmp_path / "straight"))
    assert runs.log_lines(tmp_path / "run") == runs.log_lines(tmp_path / "straight")
    weights = [torch.load(tmp_path / n / "lm.ckpt") for n in ("run", "straight")]
    assert_identical(*weights)


def test_numbers_that_go_wrong_change_no_weight(tmp_path, monkeypatch):
    whole, seen = LMBrain.compute_objectives, []

    def objectives(self, logits, batch, stage):
        seen.append(1)
        return whole(self, logits, batch, stage) * (float("nan") if len(seen) == 2 else 1.0)

    monkeypatch.setattr(LMBrain, "compute_objectives", objectives)
    train("mamba", tmp_path / "run", number_of_epochs=1)
    assert "skipped batches: 1" in (tmp_path / "run/train_log.txt").read_text()
    assert "sentence " in (tmp_path / "run/log.txt").read_text()
    found = Checkpointer(tmp_path / "run/save").find_checkpoint()
    state = torch.load(found.paramfiles["model"], weights_only=True)
    assert all(x.isfinite().all() for x in state.values())


def test_memory_that_runs_out_halves_the_batch(tmp_path, monkeypatch):
    whole, seen = LMBrain.compute_forward, []

    def forward(self, batch, stage):
        seen.append(len(batch))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, batch, stage)

    monkeypatch.setattr(LMBrain, "compute_forward", forward)
    train("mamba", tmp_path / "run", number_of_epochs=1)
    assert seen[0] == seen[1] + seen[2]
    assert "lower --max_batch_tokens (now 100)" in (tmp_path / "run/log.txt").read_text()


# ---- In recognisers ----


def test_it_joins_the_test_stage_the_package_and_transcribing(lm, tmp_path, monkeypatch, capsys):
    kind, folder, _ = lm
    run, plain = trained("s2s")
    options = {"resume": run, "skip_train": True, "test_splits": "[test-a]", "lm_weight": 2.0}
    options |= {"no_lm": False, "pretrained_lm_tokenizer_path": folder}
    runs.train(RECIPES["s2s"], tmp_path / "run", **options)
    stage = texts(tmp_path / "run")
    assert stage != {name: texts(run)[name] for name in stage}
    packaged = package(tmp_path / "run", tmp_path / "package")
    search = Recognizer.from_folder(packaged, device="cpu").search
    assert type(search.language_model).__name__.lower().startswith(kind)
    recordings = sorted((runs.corpus() / "test-a").rglob("*.flac"))
    found = {}
    for name, model, more in (
        ("package", packaged, []),
        ("--lm", plain, ["--lm", folder, "--lm-weight", 2]),
        ("without", plain, []),
    ):
        words = ["transcribe.py", *recordings, "--model", model, "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", [str(w) for w in words])
        with pytest.raises(SystemExit) as stopped:
            transcribe.main()
        assert stopped.value.code == 0
        found[name] = capsys.readouterr().out
    assert found["package"] == found["--lm"] != found["without"]
    lines = [line.split("\t") for line in found["package"].splitlines()]
    assert {Path(name).stem: text for name, text in lines} == stage


@pytest.mark.parametrize("lm", ["mamba"], indirect=True)
def test_mistakes_of_those_who_join_them(lm, tmp_path):
    _, folder, _ = lm
    run, plain = trained("s2s")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "tokenizer.ckpt").write_bytes(b"another")
    options = {"resume": run, "skip_train": True, "no_lm": False}
    with pytest.raises(UserError, match=r"speaks the units of .*--tokenizer_path"):
        runs.train(RECIPES["s2s"], tmp_path / "run", pretrained_lm_tokenizer_path=other, **options)
    with pytest.raises(UserError, match="--tokenizer_path of that file"):
        Recognizer.from_folder(plain, "cpu", lm=other)
    with pytest.raises(UserError, match=r"holds no lm\.ckpt"):
        Recognizer.from_folder(plain, "cpu", lm=run)
    with pytest.raises(UserError, match="this is a CTC model, whose search takes a word n-gram"):
        Recognizer.from_folder(trained("ctc")[1], "cpu", lm=folder)
    (folder / "lm.json").rename(other / "described")
    try:  # as if it were the published one
        with pytest.raises(UserError, match="do not fit the language model of the YAML file"):
            Recognizer.from_folder(plain, "cpu", lm=folder)
    finally:
        (other / "described").rename(folder / "lm.json")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_text": "[]"}, r"train_text is empty; give texts, such as --train_text"),
        ({"train_text": "nowhere.txt"}, "must be a list"),
        ({"train_text": "[nowhere.txt]"}, r"train_text=nowhere.txt is neither file nor folder"),
        ({"dev_text": "[{}/empty.txt]"}, r"dev_text=.*empty.txt holds no sentence"),
        ({"train_text": "[{}/latin.txt]"}, r"latin.txt, line 1 is no UTF-8"),
        (
            {"output_neurons": 4000, "token_type": "bpe"},
            "no bpe tokenizer of 4000 units can be trained",
        ),
        ({"max_tokens": 1}, "raise --max_tokens"),
        ({"dev_text": "[{}/small.txt]"}, "has no unit for 2 of 4 tokens, as in 'bed abe'"),
        ({"tokenizer_path": "{}"}, "holds no tokenizer.ckpt"),
        ({"token_type": "letters"}, "token_type='letters' is unknown"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be positive"),
        ({"data_folder": "x"}, "unknown option --data_folder"),
        ({"skip_train": True}, "there is no checkpoint"),
    ],
)
def test_mistakes_are_told(tmp_path, overrides, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "small.txt").write_text("bed abe\n")
    (tmp_path / "latin.txt").write_bytes("SCHÖN\n".encode("latin1"))
    overrides = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in overrides.items()}
    with pytest.raises(UserError, match=message):
        train("mamba", tmp_path / "run", **overrides)


def test_more_characters_than_the_text_has_write_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"have 10 units of token_type=char.* --output_neurons 10"):
        train("mamba", tmp_path / "run", output_neurons=30)
    assert not list((tmp_path / "run").glob("tokenizer*"))


def test_help_teaches():
    text = train_LM.HELP
    for wanted in ("--train_text", "modules.lm.ngram", "pretrained_lm_tokenizer_path", "--lm "):
        assert wanted in text
    text.format(script="train_LM.py", example="a.yaml", available="none")
