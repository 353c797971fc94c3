"""A run that was stopped within an epoch ends with the very weights of one that never was."""

import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from speechbrain.core import INTRA_EPOCH_CKPT_FLAG

from modules.checkpoints import Checkpointer
from modules.errors import Stopped
from modules.randomness import generator_states, seeded, set_generator_states
from tests.recipes import runs
from tests.test_distributed import finish, start_ranks

CTC = "CTC/conmamba_tiny.yaml"
FAULTY = str(runs.ROOT / "tests/recipes/faulty.py")
# All that is random or counted: dropout of all kinds, SpecAugment of two views, noise, rooms,
# speeds, workers, running statistics of the features, a moving average of the weights,
# accumulation, whose steps the checkpoints' interval does not divide.
EVERYTHING = {
    "number_of_epochs": 2,
    "dropout": 0.2,
    "num_workers": 2,
    "grad_accumulation_factor": 2,
    "ckpt_interval_steps": 3,
    "max_batch_length_train": 6,
    "test_splits": "[test-a]",
    "noise_probability": 0.7,
    "reverberation_probability": 0.7,
    "views": 2,
    "consistency_weight": 0.2,
    "drop_path": 0.3,
    "mixer_dropout": 0.1,
    "ema_decay": 0.8,
}


def saved(folder):
    """All that the newest checkpoint holds, by file; the clock's time aside."""
    found = Checkpointer(folder / "save").find_checkpoint()
    files = [p for p in found.path.glob("*.ckpt") if p.name != "clock.ckpt"]
    return {p.name: torch.load(p, weights_only=True) if zipped(p) else p.read_text() for p in files}


def zipped(path):
    return path.read_bytes()[:2] == b"PK"


def assert_identical(a, b, name=""):
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_identical(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{name}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name


def assert_same_end(folder, straight):
    """The same weights, optimizer, schedule, statistics, generators and log."""
    assert_identical(saved(folder), saved(straight))
    assert runs.log_lines(folder) == runs.log_lines(straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happens to; how many batches it takes."""
    folder, seen = tmp_path_factory.mktemp("straight") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        whole = runs.train_CTC.ASR.fit_batch
        patch.setattr(
            runs.train_CTC.ASR, "fit_batch", lambda self, b: seen.append(1) or whole(self, b)
        )
        runs.train(CTC, folder, **EVERYTHING)
    return folder, len(seen)


# ---- Killed ----


def test_killed_again_and_again_in_one_process(straight, tmp_path, monkeypatch):
    """At two random batches, with checkpoints at other places than the straight run's."""
    folder, batches = straight
    options, first = EVERYTHING | {"ckpt_interval_steps": 2}, random.randint(3, batches - 3)
    for number in (first, random.randint(3, batches - first)):
        with monkeypatch.context() as patch, pytest.raises(runs.Killed):
            runs.die_after(patch, number)
            runs.train(CTC, tmp_path, **options)
    runs.train(CTC, tmp_path, **options)
    assert_same_end(tmp_path, folder)


@pytest.fixture
def heeded_interrupts():
    """Who was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_after_the_step(name, straight, tmp_path, monkeypatch, capfd):
    folder, batches = straight
    options = EVERYTHING | {"ckpt_interval_steps": 0}
    at = random.randint(2, batches // 2 - 2)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped by {name}; every"):
        send_at(patch, at, signal.Signals[name])
        runs.train(CTC, tmp_path, **options)
    assert f"{name}: a checkpoint is saved after this step" in capfd.readouterr().err
    assert Checkpointer(tmp_path / "save").find_checkpoint().meta[INTRA_EPOCH_CKPT_FLAG]
    runs.train(CTC, tmp_path, **options)
    assert_same_end(tmp_path, folder)


def send_at(monkeypatch, number, sent):
    """Let a training batch find a signal."""
    whole, seen = runs.train_CTC.ASR.fit_batch, []

    def fit_batch(self, batch):
        seen.append(1)
        if len(seen) == number:
            signal.raise_signal(sent)
        return whole(self, batch)

    monkeypatch.setattr(runs.train_CTC.ASR, "fit_batch", fit_batch)


def faulty(name, number, rank, folder, **options):
    """The command of a run that sends one of its processes a signal at a batch."""
    arguments = runs.arguments(CTC, folder, **options)
    return [sys.executable, FAULTY, name, str(number), str(rank), *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_process_of_its_own(name, straight, tmp_path):
    folder, batches = straight
    # Checkpoints of its own accord are for the one that cannot save.
    options = EVERYTHING | {"ckpt_interval_steps": 2 * (name == "SIGKILL")}
    number = random.randint(2, batches)
    done = runs.run(faulty(name, number, 0, tmp_path, **options), preexec_fn=runs.heed_interrupts)
    assert done.returncode == (-signal.SIGKILL if name == "SIGKILL" else 75), done.stderr
    assert "Traceback" not in done.stderr
    runs.train(CTC, tmp_path, **options)
    assert_same_end(tmp_path, folder)


# ---- Two processes ----

TWO = ["--standalone", "--nproc-per-node", 2]


@pytest.fixture(scope="module")
def straight_two(tmp_path_factory):
    """What two processes come to when nothing happens; how they are started."""
    folder, options = tmp_path_factory.mktemp("two") / "run", EVERYTHING | {"num_workers": 1}
    status, output = finish(start_ranks(runs.command(CTC, folder, **options)[1:], *TWO))
    assert status == 0, output
    return folder, options


def test_one_of_two_is_killed(straight_two, tmp_path, monkeypatch):
    """The other ends with it, and torchrun starts both again, which go on."""
    folder, options = straight_two
    # Else the new ones find the old ones' addresses (github.com/pytorch/pytorch/issues/135712).
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    command = faulty("SIGKILL", random.randint(3, 5), 1, tmp_path, **options)
    status, output = finish(start_ranks(command[1:], *TWO, "--max-restarts", 1), 400)
    assert status == 0, output
    assert "Signal 9 (SIGKILL)" in output or "exitcode: -9" in output
    assert_same_end(tmp_path, folder)


@pytest.mark.slow
def test_one_of_two_is_told_to_stop(straight_two, tmp_path):
    """Both save, and end."""
    folder, options = straight_two
    options |= {"ckpt_interval_steps": 0}
    command = faulty("SIGTERM", random.randint(2, 4), 1, tmp_path, **options)
    status, output = finish(start_ranks(command[1:], *TWO))
    assert status == 1, output
    assert "exitcode  : 75" in output
    assert "stopped by a signal to another process; everything is saved" in output
    assert Checkpointer(tmp_path / "save").find_checkpoint().meta[INTRA_EPOCH_CKPT_FLAG]
    status, output = finish(start_ranks(runs.command(CTC, tmp_path, **options)[1:], *TWO))
    assert status == 0, output
    assert_same_end(tmp_path, folder)


# ---- Elsewhere ----


def test_stopped_in_the_validation(straight, tmp_path, monkeypatch):
    """Which starts again then, after an epoch that is not."""
    folder, _ = straight
    whole, seen = runs.train_CTC.ASR.evaluate_batch, []

    def evaluate_batch(self, batch, stage):
        seen.append(1)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGTERM)
        return whole(self, batch, stage)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGTERM"):
        patch.setattr(runs.train_CTC.ASR, "evaluate_batch", evaluate_batch)
        runs.train(CTC, tmp_path, **EVERYTHING)
    assert not (tmp_path / "train_log.txt").exists()
    runs.train(CTC, tmp_path, **EVERYTHING)
    assert_same_end(tmp_path, folder)


def test_a_corpus_that_grew_since_the_stop(tmp_path, monkeypatch):
    """The epoch starts anew, with all of it; the same epoch of the same corpus goes on."""
    data = shutil.copytree(runs.corpus(), tmp_path / "data")
    options = {"number_of_epochs": 1, "ckpt_interval_steps": 2, "data_folder": data}
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        runs.die_after(patch, 3)
        runs.train(CTC, tmp_path / "run", **options)
    runs.write_split(data, "train", 9, 8, seed=9)
    seen, whole = [], runs.train_CTC.ASR.fit_batch
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.train_CTC.ASR, "fit_batch", lambda self, b: seen.extend(b.id) or whole(self, b)
        )
        runs.train(CTC, tmp_path / "run", **options)
    assert len(seen) == len(set(seen)) == 32
    (line,) = runs.log_lines(tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("Epoch 1 was stopped after 2 batches, and has others now") == 1
    with open(tmp_path / "run/train.csv") as manifest:
        assert len(manifest.readlines()) == 33
    assert line["steps"] > 2 + 5  # those before the stop count too


def test_a_second_interrupt_stops_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEP, *runs.arguments(CTC, tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=runs.ROOT,
        env=runs.environment(),
        preexec_fn=runs.heed_interrupts,
    )
    try:
        while "Ctrl-C stops at once" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
    finally:
        process.kill()


# It would end after a minute, deep in code that is not Python's.
SLOW_STEP = """
import ctypes, signal, sys, train_CTC
def fit_batch(self, batch):
    signal.raise_signal(signal.SIGINT)
    ctypes.CDLL(None).sleep(60)
train_CTC.ASR.fit_batch = fit_batch
train_CTC.main(sys.argv[1:])
"""


def test_more_processes_than_before_go_on_with_a_warning(straight, tmp_path, caplog):
    brain, *_ = runs.build(CTC, tmp_path, **EVERYTHING)
    brain.ranks.states = [{}, {}]
    brain.on_stage_start(runs.train_CTC.sb.Stage.TRAIN, 1)
    assert "The checkpoint is of 2 processes, and these are 1" in caplog.text


# ---- Random numbers ----


def draw():
    return random.random(), np.random.random(), torch.rand(1).item()


def test_generators_go_back():
    states = generator_states()
    first = draw()
    set_generator_states(states)
    assert draw() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generators_of_a_gpu_go_back():
    torch.rand(1, device="cuda")
    states = generator_states()
    first = torch.rand(3, device="cuda")
    set_generator_states(states)
    assert torch.equal(torch.rand(3, device="cuda"), first)


def test_a_key_alone_decides_what_is_drawn():
    states, drawn = generator_states(), []
    for key in ((1, 1, "a"), (1, 2, "a"), (1, 1, "a")):
        with seeded(*key):
            drawn.append(draw())
        random.random()
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))
    set_generator_states(states)
    before = draw()
    set_generator_states(states)
    with seeded("x"):
        draw()
    assert draw() == before
