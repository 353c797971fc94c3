"""Steps of which the host learns later: as with CUDA graphs; fused optimizers skip on CPUs too."""

import functools
import logging
import math
import re
import signal

import pytest
import torch

import train_CTC
from benchmarks.models import build, make_batch, training_step
from modules import hindsight, training
from modules.checkpoints import Checkpointer
from modules.ema import WeightAverage
from modules.errors import Stopped, UserError
from tests.recipes import runs
from tests.test_exact_resume import assert_identical, assert_same_end, send_at
from tests.test_numbers import at_batches, gradients_are_nan, loss_is_nan, same, state

CTC = "CTC/conmamba_tiny.yaml"
# Five batches an epoch; the features' statistics grow in the first.
OPTIONS = {"number_of_epochs": 3, "normalize_until_epoch": 2, "ema_decay": 0.8, "dropout": 0.2}
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


@pytest.fixture
def looking(monkeypatch):
    """looking(True): steps are decided on the device from now on; False: on the host."""
    monkeypatch.setattr(training, "fused", lambda cls, *_: functools.partial(cls, fused=True))

    def look(back):
        monkeypatch.setattr(train_CTC.ASR, "looks_back", lambda self: back)

    look(True)
    return look


def audio_is_nan(monkeypatch, numbers):
    """Let the first utterance of training batches of these numbers be NaN."""
    whole, seen = train_CTC.ASR.fit_batch, []

    def fit_batch(self, batch):
        seen.append(batch.id)
        if len(seen) in numbers:
            batch.sig.data[0] = math.nan
        return whole(self, batch)

    monkeypatch.setattr(train_CTC.ASR, "fit_batch", fit_batch)
    return seen


def spoil(monkeypatch, fault, numbers):
    if fault is audio_is_nan:
        return fault(monkeypatch, numbers)
    return at_batches(monkeypatch, fault, numbers)


def trained(folder, step_limit=None, **options):
    """Train: the brain, and [(loss, steps, rate, skipped)] at every checkpoint and epoch's end."""
    brain, train, valid, _ = runs.build(CTC, folder, **OPTIONS | options)
    brain.optimizer_step_limit = step_limit
    told, collect = [], brain.collect

    def collect_and_tell():
        collect()
        rate, n_steps = brain.optimizer.param_groups[0]["lr"], brain.hparams.lr_scheduler.n_steps
        loss = getattr(brain, "trained", None), brain.avg_train_loss
        told.append((loss, brain.optimizer_step, rate, n_steps, brain.skipped_batches))

    brain.collect = collect_and_tell
    runs.fit(brain, train, valid)
    return brain, told


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]


# ---- Where it can ----


def test_it_takes_graphs_one_process_and_an_optimizer_that_skips(tmp_path, monkeypatch):
    brain, *_ = runs.build(CTC, tmp_path)
    brain.init_optimizers()
    brain.graphs = object()
    assert not brain.looks_back()  # the optimizer is not fused on a CPU
    monkeypatch.setattr(training, "fused", lambda cls, *_: functools.partial(cls, fused=True))
    brain.init_optimizers()
    assert brain.looks_back()
    for name, value in (
        ("graphs", None),
        ("distributed_launch", True),
        ("scaler", torch.amp.GradScaler("cpu")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(brain, name, value)
            assert not brain.looks_back()


# ---- The same, only later ----


@pytest.mark.parametrize("fault", [loss_is_nan, gradients_are_nan, audio_is_nan])
@pytest.mark.parametrize("interval", [0, 2])
def test_all_is_as_if_the_host_had_known(fault, interval, looking, tmp_path, monkeypatch, caplog):
    """The first batch of all, the middle, ends and beginnings of epochs, two in a row, the last."""
    found = []
    for back in (False, True):
        looking(back)
        folder = tmp_path / str(back)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            seen = spoil(patch, fault, {1, 3, 5, 6, 8, 9, 15})
            brain, told = trained(folder, ckpt_interval_steps=interval)
        assert len(seen) == 15
        found.append((state(brain), told, warnings(caplog), brain.skipped_batches))
        caplog.clear()
    assert len(found[0][1]) == 3 + 6 * (interval > 0)
    assert found[0][0]["steps"] == 8
    assert len(found[0][2]) == 7
    assert_identical(found[1][1:], found[0][1:])
    assert same(found[1][0], found[0][0])
    assert_same_end(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("fault", [loss_is_nan, gradients_are_nan, audio_is_nan])
def test_all_is_as_if_the_host_had_known_where_a_step_is_some_batches(
    fault, looking, tmp_path, monkeypatch, caplog
):
    """Of a step's two batches the first, the last or both."""
    found = []
    for back in (False, True):
        looking(back)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            seen = spoil(patch, fault, {1, 4, 5, 6, 11, 12, 15})
            brain, told = trained(
                tmp_path / str(back), grad_accumulation_factor=2, ckpt_interval_steps=2
            )
        assert (brain.sum is not None) == back
        found.append((state(brain), told, warnings(caplog), brain.skipped_batches, len(seen)))
        caplog.clear()
    assert found[0][2]
    assert_identical(found[1][1:], found[0][1:])
    assert same(found[1][0], found[0][0])
    assert_same_end(tmp_path / "True", tmp_path / "False")


def test_a_step_that_is_never_finished_decides_nothing(looking, tmp_path, monkeypatch):
    """An epoch of three batches leaves one behind, and after it the next step has none that is."""
    brain, train, valid, _ = runs.build(CTC, tmp_path, **OPTIONS, grad_accumulation_factor=2)
    brain.debug, brain.debug_batches = True, 3
    at_batches(monkeypatch, loss_is_nan, {4, 5})
    weights, step = [], train_CTC.ASR.optimizers_step

    def optimizers_step(self):
        weights.append(state(self)["weights"])
        step(self)
        weights.append(state(self)["weights"])

    monkeypatch.setattr(train_CTC.ASR, "optimizers_step", optimizers_step)
    runs.fit(brain, train, valid)
    assert not same(weights[0], weights[1])
    assert same(weights[2], weights[3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_wrong_step_changes_nothing(device, looking, tmp_path, monkeypatch):
    weights = []
    at_batches(monkeypatch, gradients_are_nan, {8})
    step = train_CTC.ASR.optimizers_step

    def optimizers_step(self):
        step(self)
        weights.append(state(self)["weights"])

    monkeypatch.setattr(train_CTC.ASR, "optimizers_step", optimizers_step)
    trained(tmp_path, number_of_epochs=2, device=device)
    unchanged = [i for i in range(1, 10) if same(weights[i - 1], weights[i])]
    assert unchanged == [7]
    assert all(w.isfinite().all() for w in weights[-1].values())


@pytest.mark.parametrize("numbers", [{7, 8}, {9, 10}])
def test_many_in_a_row_stop_the_run_and_the_last_is_named(numbers, looking, tmp_path, monkeypatch):
    """Within an epoch or at its end, of which there is no checkpoint then."""
    errors = []
    for back in (False, True):
        looking(back)
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            seen = audio_is_nan(patch, numbers)
            trained(tmp_path / str(back), max_nonfinite_steps=2)
        assert f"on {seen[max(numbers) - 1][0]};" in str(error.value)
        errors.append(re.sub(r"checkpoint is \S*", "", str(error.value)))
        assert len(Checkpointer(tmp_path / str(back) / "save").list_checkpoints()) == 1
    assert f"after {max(numbers) - 2} good steps" in errors[1]
    assert errors[0] == errors[1]


def test_the_limit_of_steps_counts_those_that_were_taken(looking, tmp_path, monkeypatch):
    seen = at_batches(monkeypatch, loss_is_nan, {2})
    brain, _ = trained(tmp_path, step_limit=3)
    assert brain.optimizer_step == 3
    assert len(seen) == 4


# ---- Going on ----


@pytest.fixture
def straight(looking, tmp_path, monkeypatch):
    """A run to its end, with faults, that does not look back."""
    looking(False)
    with monkeypatch.context() as patch:
        at_batches(patch, loss_is_nan, {2, 7})
        trained(tmp_path / "straight")
    looking(True)
    return tmp_path / "straight"


def faults_from(monkeypatch, done):
    """The faults of `straight`, of a run that goes on after so many batches."""
    at_batches(monkeypatch, loss_is_nan, {n - done for n in (2, 7)})


@pytest.mark.parametrize("number", [3, 7])
def test_a_signal_saves_after_the_step(number, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        faults_from(patch, 0)
        send_at(patch, number, signal.SIGTERM)
        trained(tmp_path / "run")
    with monkeypatch.context() as patch:
        faults_from(patch, number)
        trained(tmp_path / "run")
    assert_same_end(tmp_path / "run", straight)


def test_killed_after_a_checkpoint_within_an_epoch(straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        faults_from(patch, 0)
        runs.die_after(patch, 8)  # of which seven are saved: five, and two of the second epoch
        trained(tmp_path / "run", ckpt_interval_steps=2)
    with monkeypatch.context() as patch:
        faults_from(patch, 7)
        trained(tmp_path / "run", ckpt_interval_steps=2)
    assert_same_end(tmp_path / "run", straight)


# ---- When the host looks ----

READS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "cpu", "numpy")


@pytest.mark.parametrize("batches", [1, 2])
def test_the_host_looks_when_the_next_forward_pass_is_launched(
    batches, looking, tmp_path, monkeypatch
):
    """And at nothing else within a step, of one batch or more."""
    events, heard = [], [False]

    def during(owner, name, hear, event=None):
        """Note a call, if it is heard, and hear what it calls, or not."""
        whole = getattr(owner, name)

        def noted(*args, **options):
            if event and heard[0]:
                events.append(event)
            before, heard[0] = heard[0], hear
            try:
                return whole(*args, **options)
            finally:
                heard[0] = before

        monkeypatch.setattr(owner, name, noted)

    during(train_CTC.ASR, "fit_batch", True)
    during(train_CTC.ASR, "update_average", True)
    during(train_CTC.ASR, "compute_forward", True, "forward")
    during(torch.Tensor, "backward", True, "backward")
    during(hindsight.Told, "read", False, "look")
    during(WeightAverage, "update", False, "average")  # its count of steps is the host's
    for name in READS:
        during(torch.Tensor, name, False, name)
    trained(tmp_path, number_of_epochs=2, grad_accumulation_factor=batches)
    # A validation's mean loss ends an epoch. The last step of one is settled before it.
    first, second, rest = (part.split() for part in " ".join(events).split("__float__"))
    assert not rest
    count = second.count("forward")
    looks = [["look", *["average"] * (i % batches == 0)] if i else [] for i in range(count)]
    assert count >= 5
    assert second == [e for look in looks for e in ("forward", *look, "backward")]
    # While statistics grow, SpeechBrain's count of frames is read.
    growing = [event for event in first if event not in READS]
    assert growing == [e for look in looks for e in (*look, "forward", "backward")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_come_while_the_device_is_at_later_work():
    loss, later = torch.tensor(3.5, device="cuda"), torch.cuda.Event()
    hindsight.Told(loss, loss).read()  # the first copy allocates
    told = hindsight.Told(loss, loss / 0)
    torch.cuda._sleep(10**9)
    later.record()
    assert told.read() == [3.5, math.inf]
    assert not later.query()
    assert told.copy.is_pinned()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_asks_the_device_for_nothing(batches, tmp_path):
    """What is told of the step before is waited for by an event."""
    options = ["inter_ctc_layers=[1]", "noise_probability=1.0", "reverberation_probability=1.0"]
    brain = build("conmamba", "tiny", tmp_path, "cuda", "bf16", "reduce-overhead", options)
    brain.hparams.epoch_counter.current = 99  # the features' statistics stay as they are
    brain.grad_accumulation_factor = batches
    try:
        for step in range(6):  # the second records a graph
            batch = make_batch(brain, 4, 3.0)
            torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
            training_step(brain, batch)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    brain.settle()
    assert brain.optimizer_step == 6 // batches
    assert len(brain.graphs.graphs) == 1
