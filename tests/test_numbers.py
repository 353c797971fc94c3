"""Numbers that go wrong in training: NaN in audio, losses and gradients; too many tokens."""

import copy
import itertools
import logging
import math
import re
import shutil
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

import train_CTC
from librispeech_prepare import prepare_librispeech
from modules.checkpoints import Checkpointer
from modules.losses import too_few_frames
from tests.recipes import runs
from tests.test_distributed import finish, start_ranks

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"
BAD = "1-1-0003"


def spoil(data, names):
    """Replace training utterances' audio by NaN of the same length."""
    for name in names:
        flac = data / f"train/1/1/{name}.flac"
        frames = sf.info(flac).frames
        flac.unlink()
        samples = np.full(frames, math.nan, np.float32)
        sf.write(flac.with_suffix(".wav"), samples, runs.RATE, subtype="FLOAT")


def prepared(data, folder):
    """Manifests with audio that preparation would set aside, and the options for them."""
    splits = ["test-a", "test-b"]
    options = {"merge_lst": "train", "merge_name": "train.csv", "headers_only": True}
    prepare_librispeech(data, folder, "train", "dev", splits, **options)
    return {"data_folder": data, "skip_prep": True}


@pytest.fixture
def data(tmp_path):
    return shutil.copytree(runs.corpus(), tmp_path / "data")


def loss_is_nan(loss, predictions):
    return loss * math.nan


def gradients_are_nan(loss, predictions):
    predictions[0].register_hook(lambda gradient: gradient * math.nan)
    return loss


def loss_is_zero(loss, predictions):
    return loss * 0.0


def at_batches(monkeypatch, fault, numbers, brain_class=train_CTC.ASR):
    """Let a fault (loss, predictions) -> loss happen in training batches of these numbers."""
    whole, seen = brain_class.compute_objectives, []

    def compute_objectives(self, predictions, batch, stage):
        loss = whole(self, predictions, batch, stage)
        if stage == runs.train_CTC.sb.Stage.TRAIN:
            seen.append(batch.id)
            if len(seen) in numbers:
                return fault(loss, predictions)
        return loss

    monkeypatch.setattr(brain_class, "compute_objectives", compute_objectives)
    return seen


def state(brain):
    """All that a step changes."""
    return copy.deepcopy(
        {
            "weights": brain.hparams.model.state_dict(),
            "optimizer": brain.optimizer.state_dict(),
            "schedule": brain.hparams.lr_scheduler.n_steps,
            "steps": brain.optimizer_step,
        }
    )


def same(a, b):
    """Equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def fit(yaml_file, folder, scaler=None, **options):
    """Train: the brain, and its state before the first and after every batch."""
    brain, train, valid, _ = runs.build(yaml_file, folder, **options)
    brain.scaler = scaler or brain.scaler
    states, end = [], brain.on_fit_batch_end
    whole = brain.on_fit_batch_start

    def start(batch, should_step):
        states.extend([] if states else [state(brain)])
        whole(batch, should_step)

    brain.on_fit_batch_start = start
    brain.on_fit_batch_end = lambda *args: (end(*args), states.append(state(brain)))
    runs.fit(brain, train, valid)
    return brain, states


# ---- One batch ----


@pytest.mark.parametrize(
    ("name", "precision"), [(CTC, "fp32"), (CTC, "bf16"), (S2S, "fp32"), (S2S, "bf16")]
)
@pytest.mark.parametrize("fault", [loss_is_nan, gradients_are_nan])
def test_a_wrong_batch_changes_nothing(name, fault, precision, tmp_path, monkeypatch, caplog):
    script = runs.SCRIPTS[runs.recipe_of(name)]
    seen = at_batches(monkeypatch, fault, {3}, script.ASR)
    with caplog.at_level(logging.WARNING):
        brain, states = fit(name, tmp_path, precision=precision, number_of_epochs=1)
    changed = [not same(a["weights"], b["weights"]) for a, b in itertools.pairwise(states)]
    assert changed == [True, True, False, *[True] * (len(seen) - 3)]
    assert same(states[2], states[3])
    assert brain.optimizer_step == brain.hparams.lr_scheduler.n_steps == len(seen) - 1
    (line,) = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert line.startswith("Step 3: the ")
    assert set(line.rpartition(": ")[2].split(", ")) == set(seen[2])
    (epoch,) = runs.log_lines(tmp_path)
    assert epoch["train skipped batches"] == 1
    assert math.isfinite(epoch["train loss"])


@pytest.mark.parametrize("fault", [loss_is_nan, gradients_are_nan])
@pytest.mark.parametrize("number", [1, 4])
def test_training_ends_as_without_that_batch(fault, number, tmp_path, monkeypatch):
    options = {"number_of_epochs": 2, **runs.PLAIN}
    with monkeypatch.context() as patch:
        at_batches(patch, fault, {number})
        brain, _ = fit(CTC, tmp_path / "wrong", **options)
    whole, seen = train_CTC.ASR.fit_batch, []

    def leave_out(self, batch):
        seen.append(1)
        return torch.tensor(math.nan) if len(seen) == number else whole(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train_CTC.ASR, "fit_batch", leave_out)
        other, _ = fit(CTC, tmp_path / "without", **options)
    assert same(state(brain), state(other))
    wrong, without = runs.log_lines(tmp_path / "wrong"), runs.log_lines(tmp_path / "without")
    assert wrong[0].pop("train skipped batches") == 1
    assert wrong[1] == without[1]  # nothing is said when nothing was skipped
    if fault is loss_is_nan:
        assert wrong == without


def test_a_wrong_first_batch_does_not_count_as_zero_in_the_mean_loss(tmp_path):
    brain, *_ = runs.build(CTC, tmp_path)
    mean = 0.0
    for brain.step, loss in enumerate((math.nan, 4.0, 4.0), start=1):
        mean = brain.update_average(torch.tensor(loss), mean)
    assert mean == 4.0


def test_audio_that_is_nan(data, tmp_path, caplog):
    """Through the whole script, with statistics of the features that it must not spoil."""
    spoil(data, [BAD])
    with caplog.at_level(logging.WARNING):
        options = prepared(data, tmp_path / "run")
        runs.train(CTC, tmp_path / "run", number_of_epochs=2, **options)
    first, second = runs.log_lines(tmp_path / "run")
    assert first["train skipped batches"] == second["train skipped batches"] == 1
    assert first["steps"] == 4
    assert second["train loss"] < first["train loss"] < math.inf
    log = (tmp_path / "run/log.txt").read_text()
    assert re.findall(r"so far: (.*)", log) == [BAD, BAD]
    found = Checkpointer(tmp_path / "run/save").find_checkpoint()
    statistics = torch.load(found.paramfiles["normalizer"], weights_only=True)
    assert statistics["glob_mean"].isfinite().all()
    assert statistics["glob_std"].isfinite().all()


def test_overflow_is_left_to_the_scaler(tmp_path, monkeypatch, caplog):
    """That of fp16, which runs on the CPU too: it skips the step, and the schedule waits."""
    at_batches(monkeypatch, gradients_are_nan, {2})
    with caplog.at_level(logging.WARNING):
        brain, states = fit(CTC, tmp_path, torch.GradScaler("cpu"), number_of_epochs=1)
    for key in ("weights", "optimizer", "schedule"):
        assert same(states[1][key], states[2][key])
        assert not same(states[2][key], states[3][key])
    assert brain.scaler.get_scale() == torch.GradScaler("cpu").get_scale() / 2
    assert "not finite" not in caplog.text


def test_a_wrong_loss_leaves_the_scaler_alone(tmp_path, monkeypatch):
    at_batches(monkeypatch, loss_is_nan, {2})
    brain, states = fit(CTC, tmp_path, torch.GradScaler("cpu"), number_of_epochs=1)
    assert same(states[1], states[2])
    assert brain.scaler.get_scale() == torch.GradScaler("cpu").get_scale()
    assert brain.skipped_batches == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fault", [loss_is_nan, gradients_are_nan])
def test_a_wrong_batch_changes_nothing_on_a_gpu(fault, precision, tmp_path, monkeypatch):
    at_batches(monkeypatch, fault, {8})
    _, states = fit(CTC, tmp_path, device="cuda", precision=precision, number_of_epochs=2)
    for key in ("weights", "optimizer", "schedule"):
        assert same(states[7][key], states[8][key])
    assert not same(states[8]["weights"], states[-1]["weights"])
    assert all(v.isfinite().all() for v in states[-1]["weights"].values())


# ---- Accumulation ----


def test_the_rest_of_a_step_counts(tmp_path, monkeypatch):
    options = {"number_of_epochs": 1, "grad_accumulation_factor": 2, **runs.PLAIN}
    ends = []
    # One batch that steps and one that only accumulates.
    for fault in (loss_is_nan, loss_is_zero):
        with monkeypatch.context() as patch:
            at_batches(patch, fault, {1, 4})
            ends.append(fit(CTC, tmp_path / fault.__name__, **options)[0])
    wrong, zero = ends
    assert wrong.optimizer_step == 3
    assert wrong.skipped_batches == 2
    assert same(state(wrong), state(zero))


@pytest.mark.parametrize(("fault", "numbers"), [(loss_is_nan, {3, 4}), (gradients_are_nan, {3})])
def test_a_step_without_anything_finite_is_skipped(fault, numbers, tmp_path, monkeypatch):
    at_batches(monkeypatch, fault, numbers)
    brain, states = fit(CTC, tmp_path, number_of_epochs=1, grad_accumulation_factor=2)
    assert same(states[2], states[4])
    assert not same(states[4], states[6])
    assert brain.optimizer_step == 2
    assert brain.skipped_batches == 2


# ---- Many in a row ----


def test_many_in_a_row_stop_the_run(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    runs.train(CTC, folder, data_folder=data, number_of_epochs=1)
    before = runs.files_of(folder / "save")
    first = Checkpointer(folder / "save").find_checkpoint()
    weights = torch.load(first.paramfiles["model"], weights_only=True)
    spoil(data, [p.stem for p in data.glob("train/1/1/*.flac")])
    options = prepared(data, folder) | {"number_of_epochs": 9, "max_nonfinite_steps": 7}
    monkeypatch.setattr(sys, "argv", ["train_CTC.py", *runs.arguments(CTC, folder, **options)])
    with runs.own_logging(), pytest.raises(SystemExit) as ended:
        runs.launch.run(train_CTC.main, "train_CTC.py", CTC)
    assert ended.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert "7 steps in a row had no finite loss" in error
    assert "--lr_model" in error
    assert "--precision fp32" in error
    assert (folder / "log.txt").read_text().count("the step is skipped") == 7
    # An epoch of five steps passed meanwhile; its checkpoint holds the weights of the one before.
    last = Checkpointer(folder / "save").find_checkpoint()
    assert f"The last good checkpoint is {last.path}." in error
    assert same(torch.load(last.paramfiles["model"], weights_only=True), weights)
    assert before.items() <= runs.files_of(folder / "save").items()
    options = {"data_folder": data, "skip_prep": True, "skip_train": True}
    assert "test-a" in runs.train(CTC, folder, **options)


# ---- Two processes, of which one meets it ----


def test_two_processes_decide_the_same(data, tmp_path):
    spoil(data, [BAD])
    options = prepared(data, tmp_path / "run")
    options |= {"number_of_epochs": 2, "normalize_until_epoch": 2}
    command = runs.command(CTC, tmp_path / "run", test_splits="[test-a]", **options)
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2), 60)
    assert status == 0, output
    first, second = runs.log_lines(tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    told = re.findall(
        r"Step (\d+): the loss of (\d) of 2 batches is not finite; (.*), .*: (.*)", log
    )
    assert all(BAD in ids.split(", ") for *_, ids in told)
    # In the first epoch the processes measure the features together, which spoils both losses.
    skipped = [number for _, number, what, _ in told if "skipped" in what]
    assert skipped
    assert set(skipped) == {"2"}
    assert first["train skipped batches"] == 2 * len(skipped)
    assert first["steps"] == 3 - len(skipped)
    # In the second it is one process's alone, and the step is taken with the other's gradient.
    dropped = [number for _, number, what, _ in told if what == "left out"]
    assert dropped
    assert set(dropped) == {"1"}
    assert second["train skipped batches"] == len(dropped)
    assert second["steps"] == first["steps"] + 3
    assert second["train loss"] < first["train loss"] < math.inf


# ---- More tokens than frames ----


def test_too_few_frames_are_those_that_ctc_cannot_align():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4, (200, 6), generator=generator)
    token_lengths = torch.randint(1, 7, (200,), generator=generator)
    lengths = torch.randint(1, 12, (200,), generator=generator)
    log_probs = torch.randn(12, 200, 4, generator=generator).log_softmax(-1)
    loss = torch.nn.functional.ctc_loss(log_probs, tokens, lengths, token_lengths, reduction="none")
    short = too_few_frames(tokens, lengths, token_lengths)
    assert 20 < short.sum() < 180
    assert torch.equal(short, loss.isinf())


@pytest.mark.parametrize("name", [CTC, S2S])
def test_too_many_tokens_are_counted_and_named(name, data, tmp_path, caplog):
    path = data / "train/1/1/1-1.trans.txt"
    path.write_text(re.sub(rf"^({BAD} .*)$", r"\1" + " BEAD" * 20, path.read_text(), flags=re.M))
    with caplog.at_level(logging.WARNING):
        runs.train(name, tmp_path / "run", data_folder=data, number_of_epochs=2)
    log = (tmp_path / "run/log.txt").read_text()
    assert len(re.findall(rf"1 utterances have too few frames .*, among them {BAD}\n", log)) == 2
    for epoch in runs.log_lines(tmp_path / "run"):
        assert math.isfinite(epoch["train loss"])
        assert "train skipped batches" not in epoch
