"""Kills, full disks and damaged files: the last whole checkpoint is kept and used."""

import logging
import resource
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from modules import checkpoints
from modules.checkpoints import Checkpointer, average, best, list_checkpoints, newest, resumable
from modules.digests import SUMS
from modules.errors import UserError
from modules.whole import whole
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def saved(folder, *numbers):
    """A checkpoint for each number, which is the value of all weights and the WER."""
    model = torch.nn.Linear(8, 8)
    checkpointer = Checkpointer(folder, {"model": model, "optimizer": torch.nn.Linear(2, 2)})
    found = []
    for number in numbers:
        fill(model, number)
        found.append(checkpointer.save_checkpoint(meta={"WER": float(number)}))
    return found


def fill(model, number):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, number)


def recovered(folder):
    """The number in the checkpoint that a run would go on from."""
    model = torch.nn.Linear(8, 8)
    Checkpointer(folder, {"model": model}, allow_partial_load=True).recover_if_possible()
    (number,) = {v for p in model.parameters() for v in p.unique().tolist()}
    return number


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


# ---- Kills ----


def test_a_checkpoint_is_listed_once_it_is_whole(tmp_path):
    (one,) = saved(tmp_path, 1)
    assert one.path.name.startswith("CKPT+")
    assert {p.name for p in one.path.iterdir()} == {
        "CKPT.yaml",
        "model.ckpt",
        "optimizer.ckpt",
        SUMS,
    }
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=one.path, check=True)
    assert list_checkpoints(tmp_path) == [one]


def test_killed_at_any_moment_of_a_save(tmp_path):
    script = [sys.executable, "-m", "tests.recipes.killed_saves", str(tmp_path), "40"]
    finished = runs.run(script)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 5
    assert "damaged" not in finished.stderr


# ---- Damaged files ----


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (cut, "model.ckpt"),
        (empty, "model.ckpt"),
        (remove, "model.ckpt"),
        (flip_a_bit, "model.ckpt"),
        (flip_a_bit, "optimizer.ckpt"),
        (remove, "optimizer.ckpt"),
        (flip_a_bit, "CKPT.yaml"),
        (remove, "CKPT.yaml"),
        (empty, "CKPT.yaml"),
        (flip_a_bit, SUMS),
        (cut, SUMS),
        (empty, SUMS),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, caplog, harm, name):
    one, two, three = saved(tmp_path, 1, 2, 3)
    harm(three.path / name)
    assert recovered(tmp_path) == 2
    (warning,) = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING}
    assert f"{three.path} is damaged" in warning
    assert str(two.path) in warning
    # Neither deleted, nor in the way of the next.
    checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(8, 8)})
    checkpointer.save_and_keep_only(num_to_keep=2, importance_keys=[])
    assert three.path.is_dir()
    assert not one.path.exists()
    assert two in list_checkpoints(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        resumable(three.path)


def test_the_average_leaves_out_damaged_ones(tmp_path):
    _, _, three, _ = saved(tmp_path, 1, 2, 3, 4)
    flip_a_bit(three.path / "model.ckpt")
    chosen = best(list_checkpoints(tmp_path), "WER", higher_is_better=True, number=2)
    assert [c.meta["WER"] for c in chosen] == [4, 2]
    assert average(chosen)["bias"].tolist() == [3.0] * 8


def test_when_all_are_damaged(tmp_path):
    for one in saved(tmp_path, 1, 2):
        cut(one.path / "model.ckpt")
    with pytest.raises(UserError, match=r"no whole checkpoint \(.*model.ckpt.*restore one"):
        recovered(tmp_path)


def test_checkpoints_of_earlier_versions(tmp_path):
    """They have no digests: what a kill or a full disk did to them is seen all the same."""
    found = saved(tmp_path, 1, 2, 3, 4, 5)
    for one in found:
        (one.path / SUMS).unlink()
    assert recovered(tmp_path) == 5
    cut(found[4].path / "model.ckpt")
    assert recovered(tmp_path) == 4
    remove(found[3].path / "model.ckpt")
    assert recovered(tmp_path) == 3
    empty(found[2].path / "optimizer.ckpt")
    assert recovered(tmp_path) == 2


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    runs.train(CTC, folder, number_of_epochs=2, **runs.PLAIN)
    return folder


def newest_of(folder):
    return newest(list_checkpoints(folder / "save"))


def copy_and_harm(source, target):
    """A run's folder with a bit flipped in its newest checkpoint: (that one, the one before)."""
    shutil.copytree(source, target)
    last = newest_of(target)
    flip_a_bit(last.path / "optimizer.ckpt")
    return last, newest_of(target)


def test_a_run_goes_on_from_the_last_whole_one(two_epochs, tmp_path):
    last, before = copy_and_harm(two_epochs, tmp_path / "run")
    runs.train(CTC, tmp_path / "run", number_of_epochs=2, **runs.PLAIN)
    lines = runs.log_lines(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 2]
    assert lines[1] == lines[2]
    assert last.path.is_dir()
    assert before.path.is_dir()


def test_an_evaluation_tells_what_it_averages(two_epochs, tmp_path):
    last, before = copy_and_harm(two_epochs, tmp_path / "run")
    finished = runs.run(runs.command(CTC, tmp_path / "run", skip_train=True, **runs.PLAIN))
    assert finished.returncode == 0, finished.stderr
    log = (tmp_path / "run/log.txt").read_text()
    assert f"{last.path} is damaged (optimizer.ckpt does not have the digest" in log
    assert f"the newest whole one is {before.path}" in log
    assert "Evaluating the average of 1 checkpoints" in log


def test_two_processes_go_on_from_the_same(two_epochs, tmp_path):
    _, before = copy_and_harm(two_epochs, tmp_path / "run")
    command = runs.command(CTC, tmp_path / "run", number_of_epochs=2, **runs.PLAIN)
    launcher = runs.torchrun("--standalone", "--nproc-per-node", 2)
    finished = runs.run([*launcher, *command[1:]])
    assert finished.returncode == 0, finished.stderr
    assert [line["epoch"] for line in runs.log_lines(tmp_path / "run")] == [1, 2, 2]
    assert (tmp_path / "run/log.txt").read_text().count("is damaged") == 1
    assert before.path.is_dir()


# ---- Full disks ----


def test_a_full_disk(small_disk):
    model = torch.nn.Linear(512, 512)  # 1 MB
    checkpointer = Checkpointer(small_disk, {"model": model})
    one = checkpointer.save_checkpoint(meta={"WER": 1.0})
    with pytest.raises(UserError, match=r"could not be written to .* are free there") as error:
        checkpointer.save_and_keep_only(num_to_keep=1)
    assert f"goes on from {one.path}" in str(error.value)
    assert list(small_disk.iterdir()) == [one.path]
    assert Checkpointer(small_disk, {"model": model}).recover_if_possible().path == one.path


def limit_files(size):
    """For the children of this process: no file may grow beyond `size`."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_disk_is_full_stops(two_epochs, tmp_path, processes):
    folder = tmp_path / "run"
    shutil.copytree(two_epochs, folder)
    before, last = runs.files_of(folder / "save"), newest_of(folder)
    command = runs.command(CTC, folder, number_of_epochs=3, **runs.PLAIN)
    if processes > 1:
        command = [*runs.torchrun("--standalone", "--nproc-per-node", processes), *command[1:]]
    # The biggest file of a checkpoint does not fit, the logs do.
    size = max(p.stat().st_size for p in last.path.iterdir()) - 1000
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=runs.ROOT,
        env=runs.environment(),
        preexec_fn=limit_files(size),
        check=False,
    )
    assert finished.returncode == (2 if processes == 1 else 1), finished.stderr
    (told,) = [x for x in finished.stderr.splitlines() if x.startswith("error:")]
    assert "a checkpoint could not be written to" in told
    assert f"goes on from {last.path}" in told
    assert runs.files_of(folder / "save") == before
    runs.train(CTC, folder, number_of_epochs=3, **runs.PLAIN)
    assert newest_of(folder).meta["epoch"] == 3


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(2, 2)})
    checkpointer.custom_save_hooks["model"] = lambda obj, path: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        checkpointer.save_checkpoint()
    assert not list(tmp_path.iterdir())


# ---- Space before the first epoch ----


def test_space_is_checked_before_the_first_epoch(small_disk):
    with pytest.raises(UserError, match=r"MB free, and this run will write .* MB: 5 checkpoints"):
        runs.train(CTC, small_disk, number_of_epochs=9, d_model=64, d_ffn=256, **runs.PLAIN)
    assert not list(small_disk.glob("save/CKPT+*"))
    assert "epoch:" not in "".join(p.read_text() for p in small_disk.glob("train_log.txt"))


def test_what_is_there_already_needs_no_more_space(two_epochs, tmp_path, monkeypatch):
    shutil.copytree(two_epochs, tmp_path / "run")
    weights = torch.load(newest_of(tmp_path / "run").paramfiles["model"], weights_only=True)
    size = 3 * sum(tensor.nbytes for tensor in weights.values())
    usage = namedtuple("usage", "free")
    # Two of at most five are there: three more, but one an epoch that is left.
    for free, epochs, fits in ((3 * size, 9, True), (2 * size, 9, False), (2 * size, 3, True)):
        brain, *_ = runs.build(CTC, tmp_path / "run", number_of_epochs=epochs)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.shutil, "disk_usage", lambda _, free=free: usage(free))
            if fits:
                brain.on_fit_start()
            else:
                with pytest.raises(UserError, match="lower --avg_checkpoints"):
                    brain.on_fit_start()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path) as beside:
        beside.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with whole(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
