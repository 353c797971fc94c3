"""Two runs in one output folder: the second is told of the first, and starts when that is gone."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from modules.errors import UserError
from modules.lock import FolderLock
from tests.recipes import runs

HOLD = "import sys, time; from modules.lock import FolderLock; lock = FolderLock(sys.argv[1])"
CTC = "CTC/conmamba_tiny.yaml"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, until it is killed."""
    code = f"{HOLD}; lock.acquire(); print('held', flush=True); time.sleep(100)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_told_of_the_first(tmp_path, holder):
    with pytest.raises(UserError) as error:
        FolderLock(tmp_path).acquire()
    assert f"pid {holder.pid} on {socket.gethostname()}" in str(error.value)
    assert "--output_folder" in str(error.value)


def test_a_killed_run_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_run_that_ends_lets_others_in(tmp_path):
    for _ in range(2):
        lock = FolderLock(tmp_path / "new" / "folder")
        lock.acquire()
        lock.release()


def test_a_training_does_not_start_beside_another(tmp_path, holder):
    result = runs.run(runs.command(CTC, tmp_path))
    assert result.returncode == 2, result.stderr
    assert f"is in use by another run (pid {holder.pid}" in result.stderr
    assert "Traceback" not in result.stderr
    # Reading the YAML file makes the empty folder of checkpoints.
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".lock_holder", "save"}
    assert not list((tmp_path / "save").iterdir())


def test_an_evaluation_runs_beside_a_training(tmp_path, holder):
    result = runs.run(runs.command(CTC, tmp_path, skip_train=True))
    assert "there is no checkpoint" in result.stderr  # further than the lock
