"""A YAML file that is no recipe, or lacks a part of one, or whose objects cannot be made."""

import re
from pathlib import Path

import pytest

from modules.errors import UserError
from modules.keys import Attributes, Keys
from modules.options import load
from tests.recipes import runs
from tests.recipes.mistakes import call

CTC = "CTC/conmamba_tiny.yaml"


@pytest.mark.parametrize("text", ["a: [", "- a", "", "a: !ref <b>"])
def test_a_file_that_is_no_hyperpyyaml(capfd, monkeypatch, tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    status, _, err = call(capfd, monkeypatch, "CTC", [tmp_path / "a.yaml"])
    assert status == 2
    assert "a.yaml" in err


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: 1", "precision"),
        ("{num_workers: 0, precision: fp32, output_folder: a, save_folder: b}", "tokenizer"),
    ],
)
def test_a_file_that_is_no_recipe(capfd, monkeypatch, tmp_path, text, key):
    (tmp_path / "a.yaml").write_text(text)
    status, _, err = call(capfd, monkeypatch, "CTC", [tmp_path / "a.yaml", "--device", "cpu"])
    assert status == 2
    assert f"a.yaml lacks the key {key}; copy it from hparams/" in err


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("normalize", "refers to <normalize>, which it lacks; copy it from hparams/CTC/conmamba_"),
        ("max_seconds", "lacks the key max_seconds; copy it from hparams/CTC/conmamba_"),
        ("fea_augment", "lacks the key fea_augment; copy it from hparams/CTC/conmamba_"),
        ("    encoder", "modules lacks encoder; add encoder: !ref <encoder>"),
    ],
)
def test_a_recipe_that_lacks_a_part(capfd, monkeypatch, tmp_path, gone, message):
    """Told when it is read, also in the middle of a training."""
    path, *options = runs.arguments(CTC, tmp_path / "run", number_of_epochs=1)
    text = Path(path).read_text()
    (tmp_path / "a.yaml").write_text(re.sub(rf"^{gone}:.*\n( +.*\n)*", "", text, flags=re.M))
    options = [o for o in options if not o.startswith((f"--{gone}=", f"--{gone}_"))]
    status, out, err = call(capfd, monkeypatch, "CTC", [tmp_path / "a.yaml", *options])
    assert status == 2 and "Traceback" not in out + err
    assert message in err


def test_evaluating_by_a_recipe_of_before_there_was_skip_train(capfd, monkeypatch, tmp_path):
    path, *options = runs.arguments(CTC, tmp_path / "run")
    text = Path(path).read_text()
    (tmp_path / "a.yaml").write_text(text.replace("skip_train: False\n", ""))
    argv = [tmp_path / "a.yaml", *options, "--test_only"]
    status, out, err = call(capfd, monkeypatch, "CTC", argv)
    assert status == 2 and "Traceback" not in out + err
    assert "a.yaml lacks the key skip_train, which --test_only sets to True; add the line" in err


def test_missing_attributes_are_told_and_can_be_asked_for():
    hparams = Attributes(Keys("a.yaml", {"seed": 1}))
    assert hparams.seed == 1 and vars(hparams) == {"seed": 1}
    assert not hasattr(hparams, "lm") and getattr(hparams, "ema_decay", 0.5) == 0.5
    with pytest.raises(UserError, match=r"^a.yaml lacks the key lm; copy it from hparams/LM/"):
        hparams.lm  # noqa: B018
    with pytest.raises(AttributeError, match="lacks the key nowhere; begin with a file of hparams"):
        hparams.nowhere  # noqa: B018


def test_a_mistake_of_the_code_keeps_its_trace(tmp_path):
    (tmp_path / "a.yaml").write_text("a: {b: !apply:builtins.getattr [1, nothing]}\n")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        load(tmp_path / "a.yaml", {})
    (tmp_path / "a.yaml").write_text("a: {b: !new:torch.nn.Dropout {p: x}}\n")
    with pytest.raises(UserError, match=r"a.yaml: a cannot be made by torch.nn.Dropout: .* p=x$"):
        load(tmp_path / "a.yaml", {})
