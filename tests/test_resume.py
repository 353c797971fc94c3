"""Stopping, killing and continuing runs; checkpoints that are found, kept and averaged."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from modules.checkpoints import Checkpointer, best, resumable
from modules.errors import UserError
from tests.recipes import runs
from tests.test_hparams import RECIPES

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"


def newest_weights(folder):
    found = Checkpointer(folder / "save").find_checkpoint()
    return torch.load(found.paramfiles["model"], weights_only=True)


def assert_same_run(folder, reference):
    """The same log, epoch by epoch, and the same weights at the end."""
    assert runs.log_lines(folder) == runs.log_lines(reference)
    ours, theirs = newest_weights(folder), newest_weights(reference)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two epochs at once, with nothing random but the order of utterances."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    runs.train(CTC, folder, number_of_epochs=2, **runs.PLAIN)
    return folder


def test_stopped_after_an_epoch(straight, tmp_path):
    runs.train(CTC, tmp_path, number_of_epochs=1, **runs.PLAIN)
    assert len(runs.log_lines(tmp_path)) == 1
    printed = runs.train(CTC, tmp_path, number_of_epochs=2, **runs.PLAIN)
    assert "2 epochs, 10 steps" in printed
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize(("batches", "left"), [(7, 3), (8, 3)])
def test_killed_within_an_epoch(straight, tmp_path, monkeypatch, batches, left):
    # Checkpoints every two batches: the one within the second epoch is the newest.
    options = {"number_of_epochs": 2, "ckpt_interval_steps": 2, **runs.PLAIN}
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        runs.die_after(patch, batches)
        runs.train(CTC, tmp_path, **options)
    seen = []
    with monkeypatch.context() as patch:
        whole = runs.train_CTC.ASR.fit_batch
        patch.setattr(
            runs.train_CTC.ASR, "fit_batch", lambda self, b: seen.append(1) or whole(self, b)
        )
        runs.train(CTC, tmp_path, **options)
    assert len(seen) == left  # the eighth batch, done but not saved, is taken again
    assert_same_run(tmp_path, straight)


def test_killed_by_the_system(straight, tmp_path):
    options = {"number_of_epochs": 2, **runs.PLAIN}
    process = subprocess.Popen(
        runs.command(CTC, tmp_path, **{**options, "number_of_epochs": 1000}),
        stdout=subprocess.DEVNULL,
        cwd=runs.ROOT,
        env=runs.environment(),
    )
    runs.wait_for_epochs(tmp_path, 1, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(runs.log_lines(tmp_path))
    # It goes on from its newest whole checkpoint: no epoch is missing in the log.
    runs.train(CTC, tmp_path, **{**options, "number_of_epochs": done + 2})
    lines = runs.log_lines(tmp_path)
    assert {int(line["epoch"]) for line in lines} == set(range(1, done + 3))
    assert lines[0] == runs.log_lines(straight)[0]
    assert [line["steps"] for line in lines] == [5 * line["epoch"] for line in lines]


def test_a_finished_run_trains_no_more_and_evaluates_again(straight, tmp_path):
    before, log = runs.files_of(straight / "save"), runs.log_lines(straight)
    wer = (straight / "wer_test-a.txt").read_text()
    (straight / "wer_test-a.txt").unlink()
    printed = runs.train(CTC, straight, number_of_epochs=2, **runs.PLAIN)
    assert "2 epochs, 10 steps" in printed
    assert runs.log_lines(straight) == log
    assert runs.files_of(straight / "save") == before
    assert (straight / "wer_test-a.txt").read_text() == wer


def test_time_adds_up_over_processes(tmp_path, monkeypatch):
    """Stopped and continued, each for an hour, and then evaluated once more."""
    printed, whole = [], runs.train_CTC.ASR.on_fit_start

    def an_hour_later(self):
        whole(self)
        self.clock.since -= 3600

    with monkeypatch.context() as patch:
        patch.setattr(runs.train_CTC.ASR, "on_fit_start", an_hour_later)
        printed += [runs.train(CTC, tmp_path, number_of_epochs=n, **runs.PLAIN) for n in (1, 2)]
    printed.append(runs.train(CTC, tmp_path, number_of_epochs=2, **runs.PLAIN))
    printed.append(runs.train(CTC, tmp_path, skip_train=True, **runs.PLAIN))
    minutes = [float(re.search(r"^time +([\d.]+) min$", text, re.M)[1]) for text in printed]
    assert minutes == pytest.approx([60, 120, 120, 0], abs=5)


def test_time_is_not_known_after_a_checkpoint_without(straight, tmp_path):
    source = max(straight.glob("save/CKPT+*"), key=lambda p: p.stat().st_mtime)
    older = shutil.ignore_patterns("clock.ckpt", "SHA256SUMS")
    shutil.copytree(source, tmp_path / "save" / source.name, ignore=older)
    for _ in range(2):  # the second finds the first one's checkpoint
        printed = runs.train(CTC, tmp_path, number_of_epochs=3, **runs.PLAIN)
        assert re.search("^time +unknown$", printed, re.M)


@pytest.mark.parametrize("place", ["", "save", "save/CKPT"])
def test_resume_from_another_folder(straight, tmp_path, place):
    source = straight / place
    if place.endswith("CKPT"):
        source = min(straight.glob("save/CKPT+*"), key=lambda p: p.stat().st_mtime)
    before = runs.files_of(straight)
    runs.train(CTC, tmp_path / "run", number_of_epochs=3, resume=source, **runs.PLAIN)
    first = runs.log_lines(tmp_path / "run")[0]
    if place.endswith("CKPT"):
        # The older one: its next epoch is the second.
        assert first == runs.log_lines(straight)[1]
    else:
        assert (first["epoch"], first["steps"]) == (3, 15)
        assert first["train loss"] < runs.log_lines(straight)[1]["train loss"]
    assert runs.files_of(straight) == before


def test_resume_goes_on_with_its_own_checkpoints_once_there_are_some(straight, tmp_path):
    for epochs in (3, 4):
        runs.train(CTC, tmp_path, number_of_epochs=epochs, resume=straight, **runs.PLAIN)
    assert f"of its own: resume={straight} is not used" in (tmp_path / "log.txt").read_text()
    assert [line["epoch"] for line in runs.log_lines(tmp_path)] == [3, 4]


def test_resume_brings_the_tokenizer(tmp_path):
    options = {"valid_search_interval": 10}
    runs.train(S2S, tmp_path / "a", number_of_epochs=1, **options)
    # Trained on other transcripts, a tokenizer would number the units otherwise.
    runs.train(
        S2S,
        tmp_path / "b",
        number_of_epochs=2,
        resume=tmp_path / "a",
        train_splits="[dev]",
        **options,
    )
    models = [(tmp_path / run / "save/tokenizer.model").read_bytes() for run in "ab"]
    assert models[0] == models[1]
    (tmp_path / "a/save/tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"a/save/tokenizer\.model is missing, whose units"):
        runs.train(S2S, tmp_path / "c", resume=tmp_path / "a", **options)


@pytest.mark.parametrize("wrong", ["nowhere", "nowhere/CKPT+1", "empty", "empty/CKPT+1"])
@pytest.mark.parametrize("skip_train", [False, True])
def test_a_wrong_resume_path(tmp_path, wrong, skip_train):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint; give an output folder"):
        runs.train(CTC, tmp_path / "run", resume=tmp_path / wrong, skip_train=skip_train)
    # Looking made nothing there, and what failed did not overwrite what ran.
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "run"}
    assert not list((tmp_path / "empty").iterdir())
    assert not (tmp_path / "run/hyperparams.yaml").exists()


def test_a_checkpoint_of_weights_and_statistics_alone(straight, tmp_path):
    source = max(straight.glob("save/CKPT+*"), key=lambda p: p.stat().st_mtime)
    converted = tmp_path / "converted/save" / source.name
    converted.mkdir(parents=True)
    for name in ("CKPT.yaml", "model.ckpt", "normalizer.ckpt"):
        (converted / name).write_bytes((source / name).read_bytes())
    options = {"avg_checkpoints": 1, **runs.PLAIN}
    runs.train(CTC, tmp_path / "converted", skip_train=True, **options)
    runs.train(CTC, tmp_path / "tuned", number_of_epochs=1, resume=converted, **options)
    (tuned,) = runs.log_lines(tmp_path / "tuned")
    assert (tuned["epoch"], tuned["steps"]) == (1, 5)
    assert tuned["train loss"] < runs.log_lines(straight)[1]["train loss"]


def test_another_model_in_the_same_folder(straight):
    before = runs.files_of(straight / "save"), (straight / "hyperparams.yaml").read_text()
    for skip_train in (False, True):
        with pytest.raises(UserError, match=r"the model in .* is another \(") as error:
            runs.train(CTC, straight, number_of_epochs=3, d_model=24, skip_train=skip_train)
        assert "new --output_folder" in str(error.value)
    assert before == (runs.files_of(straight / "save"), (straight / "hyperparams.yaml").read_text())


@pytest.mark.parametrize("skip_train", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_other_features_or_another_order_of_the_alphabet(straight, tmp_path, resumed, skip_train):
    """Of the same sizes: everything fits, and every text would be wrong."""
    before = runs.files_of(straight / "save")
    folder = tmp_path / "run" if resumed else straight
    options = {"number_of_epochs": 3, "skip_train": skip_train}
    options |= {"resume": straight} if resumed else {}
    for message, change in (
        ("with other tokens, or in another order", {"alphabet": "ZYXWVUTSRQPONMLKJIHGFEDCBA '"}),
        (r"with hop_length=10 \(here 8\); give what", {"hop_length": 8}),
    ):
        with pytest.raises(UserError, match=message):
            runs.train(CTC, folder, **options, **change)
    assert before == runs.files_of(straight / "save")


def test_debugging_does_not_write_over_a_training(straight, tmp_path):
    before = runs.files_of(straight)
    with pytest.raises(UserError, match="another --output_folder"):
        runs.train(CTC, straight, "--debug")
    with pytest.raises(UserError, match="there is none to test; add --resume"):
        runs.train(CTC, straight, "--debug", skip_train=True)
    assert before == runs.files_of(straight)
    options = {"skip_train": True, "resume": straight}
    runs.train(CTC, tmp_path / "run", "--debug", **options, **runs.PLAIN)
    text = (tmp_path / "run/summary.txt").read_text()
    assert f"checkpoints  {tmp_path}/run/save" not in text and "checkpoints  /" in text


def test_statistics_that_were_never_taken(straight, tmp_path):
    """Trained with each utterance's own, tested with a training's."""
    with pytest.raises(UserError, match="no statistics of its features"):
        runs.train(CTC, tmp_path / "run", skip_train=True, resume=straight)


# ---- Checkpoints ----


def checkpointer_of(folder, parameter):
    return Checkpointer(folder, {"model": parameter})


def test_a_half_written_checkpoint_is_none_and_goes_with_the_next(tmp_path):
    model = torch.nn.Linear(2, 2)
    checkpointer = checkpointer_of(tmp_path, model)
    whole = checkpointer.save_checkpoint(meta={"WER": 1.0})

    def fail(obj, path):
        Path(path).write_bytes(b"half")
        raise runs.Killed

    checkpointer.custom_save_hooks["model"] = fail
    with pytest.raises(runs.Killed):
        checkpointer.save_checkpoint()
    assert len(list(tmp_path.iterdir())) == 2
    assert [c.path for c in checkpointer_of(tmp_path, model).list_checkpoints()] == [whole.path]
    assert checkpointer_of(tmp_path, model).recover_if_possible().path == whole.path
    checkpointer_of(tmp_path, model).save_checkpoint()
    assert len(list(tmp_path.iterdir())) == 2
    assert len(checkpointer.list_checkpoints()) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_writes_whole_checkpoints(name):
    text = (runs.ROOT / "hparams" / name).read_text()
    assert "checkpointer: !new:modules.checkpoints.Checkpointer" in text


def test_averages_end_of_epoch_checkpoints_alone(tmp_path):
    checkpointer = checkpointer_of(tmp_path, torch.nn.Linear(2, 2))
    for wer in (30.0, 10.0, 20.0, 10.0):
        checkpointer.save_checkpoint(meta={"WER": wer})
        checkpointer.save_checkpoint(end_of_epoch=False, meta={"intra": True})
    found = checkpointer.list_checkpoints()
    chosen = best(found, "WER", higher_is_better=False, number=3)
    assert [c.meta["WER"] for c in chosen] == [10, 10, 20]
    assert chosen[0].meta["unixtime"] > chosen[1].meta["unixtime"]
    assert [c.meta["WER"] for c in best(found, "WER", True, 2)] == [30, 20]
    within = [c for c in found if "WER" not in c.meta]
    assert best(within, "WER", False, 3) == [max(within, key=lambda c: c.meta["unixtime"])]


def test_a_run_evaluates_the_average_of_its_epochs(tmp_path):
    options = {"number_of_epochs": 3, "avg_checkpoints": 10, "ckpt_interval_steps": 2}
    brain, train, valid, _ = runs.build(CTC, tmp_path, **options)
    runs.fit(brain, train, valid)
    found = Checkpointer(tmp_path / "save").list_checkpoints()
    epochs = [c for c in found if "WER" in c.meta]
    assert (len(found), len(epochs)) == (4, 3)
    states = [torch.load(c.paramfiles["model"], weights_only=True) for c in epochs]
    brain.on_evaluate_start()
    for name, value in brain.hparams.model.state_dict().items():
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(value, mean, msg=name)


def test_old_checkpoints_go_and_the_best_and_newest_stay(tmp_path):
    brain, train, valid, _ = runs.build(CTC, tmp_path, number_of_epochs=6, avg_checkpoints=2)
    rates = iter([50.0, 10.0, 20.0, 90.0, 80.0, 70.0])
    brain.error_rates = lambda: {"WER": next(rates), "CER": 0.0}
    runs.fit(brain, train, valid)
    kept = {c.meta["epoch"] for c in resumable(tmp_path)}
    assert kept == {2, 3, 5, 6}


def test_evaluated_with_other_data_the_run_keeps_its_own(straight, tmp_path):
    """Which need not be there."""
    folder = shutil.copytree(straight, tmp_path / "run")
    for split in ("dev", "test-a"):
        shutil.copytree(runs.corpus() / split, tmp_path / "data" / split)
    (tmp_path / "data/test-a").rename(tmp_path / "data/other")
    options = {"skip_train": True, "test_splits": "[other]", **runs.PLAIN}
    printed = runs.train(CTC, folder, data_folder=tmp_path / "data", **options)
    assert "2 epochs, 10 steps" in printed and "\nother " in printed
    for name in ("train.csv", "hyperparams.yaml"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
