"""Processes that die, and places that cannot be written to."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from speechbrain.dataio.dataloader import SaveableDataLoader

from modules.errors import UserError
from modules.lock import FolderLock
from modules.workers import Restarting, end_workers
from tests.recipes import runs
from tests.test_distributed import finish, start_ranks
from tests.test_exact_resume import EVERYTHING, TWO, faulty

CTC = "CTC/conmamba_tiny.yaml"


# ---- Workers that load data ----


class Deadly(torch.utils.data.Dataset):
    """Numbers, of which one kills its reader, as often as there are files to count it."""

    def __init__(self, folder, deaths):
        for i in range(deaths):
            (folder / str(i)).touch()
        self.folder = folder

    def __len__(self):
        return 12

    def __getitem__(self, i):
        left = list(self.folder.iterdir())
        if i == 7 and left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return i


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
# With it a thread reads what workers send, where there is a GPU.
pinned = pytest.mark.parametrize("pin", [False, pytest.param(True, marks=GPU)])


@pinned
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_are_killed_are_started_again(persistent, pin, tmp_path, caplog):
    options = {"batch_size": 2, "num_workers": 2, "persistent_workers": persistent}
    options["pin_memory"] = pin
    loader = SaveableDataLoader(Deadly(tmp_path, 2), **options)
    batches = [batch.tolist() for batch in Restarting(loader)]
    assert batches == [[i, i + 1] for i in range(0, 12, 2)]
    assert caplog.text.count("all are started again") == 2


def test_workers_that_die_between_epochs_are_started_again(tmp_path, caplog):
    """Those that live on are waited for no longer than those that are killed at work."""
    options = {"batch_size": 2, "num_workers": 2, "persistent_workers": True}
    loader = SaveableDataLoader(Deadly(tmp_path, 0), **options)
    epochs = [[batch.tolist() for batch in Restarting(loader)]]
    first = {worker.pid for worker in loader._iterator._workers}
    epochs += [[batch.tolist() for batch in Restarting(loader)]]
    assert {worker.pid for worker in loader._iterator._workers} == first
    os.kill(min(first), signal.SIGKILL)
    epochs += [[batch.tolist() for batch in Restarting(loader)]]
    assert epochs == 3 * [[[i, i + 1] for i in range(0, 12, 2)]]
    assert "all are started again" in caplog.text
    workers = loader._iterator._workers
    end_workers(loader)
    assert not any(worker.is_alive() for worker in workers)


def test_workers_that_are_always_killed_end_the_run(tmp_path):
    loader = SaveableDataLoader(Deadly(tmp_path, 9), batch_size=2, num_workers=2)
    with pytest.raises(
        UserError, match=r"killed 2 times \(.*DataLoader worker.*lower --num_workers"
    ):
        list(Restarting(loader, limit=2))


class CutOff:
    """A batch that breaks on its way, the first time, since its worker is being killed."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return receive, (self.folder, os.getpid())


def receive(folder, sender):
    for left in folder.iterdir():
        left.unlink()
        threading.Timer(0.2, os.kill, (sender, signal.SIGKILL)).start()
        raise ConnectionResetError("in the middle of a batch")
    return "whole"


@pinned
def test_a_batch_that_is_cut_off_is_read_again(pin, tmp_path, caplog):
    """A killed worker's connections end a moment before it counts as ended."""
    (tmp_path / "left").touch()
    options = {"num_workers": 1, "persistent_workers": True, "pin_memory": pin}
    loader = SaveableDataLoader([1, 2], collate_fn=lambda _: CutOff(tmp_path), **options)
    assert list(Restarting(loader)) == ["whole", "whole"]
    # What is noticed first: the thread that pins batches, or the worker itself.
    why = "(Pin memory thread|DataLoader worker .*) exited" if pin else "in the middle of a batch"
    assert len(re.findall(f"{why}.*; all are started again", caplog.text)) == 1
    end_workers(loader)


def test_other_errors_of_workers_are_not_hidden():
    loader = SaveableDataLoader([1, "x"], num_workers=1, collate_fn=lambda items: items[0] + 1)
    with pytest.raises(TypeError):
        list(Restarting(loader))


# ---- One of several processes ----


@pytest.mark.slow
def test_a_killed_process_ends_all_in_bounded_time(tmp_path):
    options = EVERYTHING | {"num_workers": 1, "ckpt_interval_steps": 2}
    process = start_ranks(faulty("SIGKILL", 5, 1, tmp_path, **options)[1:], *TWO)
    status, output = finish(process)
    ended = time.time()
    assert status == 1, output
    assert "error: another process ended or does not answer" in output
    assert "Signal 9 (SIGKILL)" in output
    (folder,) = (tmp_path / "save").glob("CKPT+*")
    assert ended - folder.stat().st_mtime < 60
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


# ---- Output folders ----


def test_a_read_only_output_folder(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(tmp_path)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted")
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    try:
        for place in (tmp_path, tmp_path / "run"):
            with pytest.raises(UserError, match=r"no permission to write to .*--output"):
                runs.train(CTC, place)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


HOLD = """
import os, sys, time
from modules.lock import FolderLock
FolderLock(sys.argv[1]).acquire()
if os.fork() == 0:  # a worker that is slow to notice
    time.sleep(2)
    os._exit(0)
print("held", flush=True)
time.sleep(100)
"""


def test_the_workers_of_a_killed_run_are_waited_for(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
