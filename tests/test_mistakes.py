"""Mistakes in data, tokens, model and folders: one clear line, status 2, and nothing lost."""

import functools
import re

import pytest
import torch

from modules.errors import UserError
from tests.recipes import mistakes, runs

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"
CONFORMER = "CTC/conformer_tiny.yaml"


@pytest.fixture
def fails(capfd, monkeypatch, tmp_path):
    """Call with a mistake; returns the one line that tells it."""
    return functools.partial(mistakes.told, capfd, monkeypatch, tmp_path / "run")


# ---- Data, tokens, model ----


def test_missing_data_folder(fails, tmp_path):
    message = fails(CTC, data_folder=tmp_path / "none")
    assert f"data_folder={tmp_path / 'none'}" in message


def test_missing_split(fails):
    message = fails(CTC, train_splits="[trian]")
    assert "trian" in message


def test_missing_manifest(fails):
    message = fails(CTC, skip_prep=True)
    assert "train.csv is missing; run without --skip_prep" in message


def test_a_file_that_is_no_manifest(fails, tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert "a.csv is no manifest, whose columns are ID" in fails(CTC, train_csv=tmp_path / "a.csv")


def test_characters_outside_the_alphabet(tmp_path):
    with pytest.raises(UserError) as error:
        runs.build(CTC, tmp_path, alphabet="ABCD ", output_neurons=8)
    message = str(error.value)
    assert "unexpected characters: " in message
    assert re.search(r"'EF?' in '", message)
    assert "set --alphabet and --output_neurons" in message


def test_alphabet_and_head_differ(fails):
    message = fails(CTC, alphabet="ABCDEF ")
    assert "set --output_neurons 10" in message


def test_alphabet_on_the_command_line(tmp_path):
    brain, *_ = runs.build(CTC, tmp_path, alphabet="'ABCDEF ", output_neurons=11)
    assert brain.tokenizer.labels[3:] == list("'ABCDEF ")


def test_vocabulary_too_large_for_the_text(fails):
    message = fails(S2S, output_neurons=500, token_type="unigram")
    assert "no unigram tokenizer of 500 units can be trained from these transcripts" in message


def test_unknown_token_type(fails):
    assert "token_type" in fails(S2S, token_type="words")


def test_heads_that_do_not_divide_the_model(fails):
    message = fails(CONFORMER, d_model=18)
    assert "d_model=18 is not divisible by num_heads=4" in message
    assert message.endswith("; num_heads is set by --nhead")


def test_unknown_sorting(fails):
    message = fails(CTC, dynamic_batching=False, sorting="up")
    assert "sorting='up' is unknown; use random, ascending or descending" in message


def test_language_model_that_is_not_there(fails, tmp_path):
    assert "give a folder with tokenizer.ckpt" in fails(S2S, pretrained_lm_tokenizer_path=tmp_path)
    assert "set --pretrained_lm_tokenizer_path" in fails(S2S, no_lm=False)
    assert "set --kenlm_model_path" in fails(CTC, no_lm=False)
    message = fails(CTC, no_lm=False, kenlm_model_path=tmp_path / "a.arpa")
    assert f"the n-gram {tmp_path / 'a.arpa'} is no file" in message
    (tmp_path / "a.arpa").write_text("THE CAT\n")
    message = fails(CTC, no_lm=False, kenlm_model_path=tmp_path / "a.arpa")
    assert f"{tmp_path / 'a.arpa'} holds no n-gram" in message


def test_language_model_that_does_not_fit(fails, tmp_path):
    tokenizer = tmp_path / "first/save/tokenizer.model"
    runs.build(S2S, tmp_path / "first")
    (tmp_path / "tokenizer.ckpt").write_bytes(tokenizer.read_bytes())
    torch.save({"weight": torch.zeros(2)}, tmp_path / "lm.ckpt")
    small = "{d_model: 16, nhead: 2, num_encoder_layers: 1, d_ffn: 16}"
    message = fails(S2S, no_lm=False, pretrained_lm_tokenizer_path=tmp_path, make_lm=small)
    assert "do not fit the language model of the YAML file" in message
    # Found before training.
    assert not (tmp_path / "run/train_log.txt").exists()


# ---- Folders ----


def test_a_file_in_the_way_of_the_output_folder(fails, tmp_path):
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        message = fails(CTC, folder=folder)
        assert f"{tmp_path / 'file'} is a file; give another --output_folder" in message
    assert (tmp_path / "file").read_text() == "precious"


def test_evaluating_what_was_never_trained(fails, tmp_path):
    message = fails(CTC, skip_train=True)
    assert f"there is no checkpoint in {tmp_path / 'run/save'}; train first" in message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.train(CTC, folder, number_of_epochs=1)
    return folder


@pytest.mark.parametrize(
    "mistake",
    [
        {"data_folder": "/no/corpus"},
        {"test_splits": "[nowhere]"},
        {"d_model": 24},
        {"alphabet": "ABC ", "output_neurons": 7},
        {"precision": "fp16"},
        {"resume": "/no/run", "output_folder": None},
    ],
)
def test_a_mistake_loses_nothing(fails, finished, mistake):
    # Logs grow, and the state of preparation may change; results and checkpoints stay.
    state = ("prepare_report.txt", "prepare_state.json", "quarantine.tsv")
    logs = ("log.txt", "env.log", *state)
    before = {k: v for k, v in runs.files_of(finished).items() if k not in logs}
    if "resume" in mistake:
        mistake = {"resume": "/no/run"}
        fails(CTC, **mistake)
    else:
        fails(CTC, folder=finished, **mistake)
    after = runs.files_of(finished)
    assert {k: after.get(k) for k in before} == before
