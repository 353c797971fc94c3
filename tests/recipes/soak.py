"""A training to which everything happens, beside one to which nothing does.

python -m tests.recipes.soak [--minutes 120] [--every 60] [--folder DIR]

Faults come in rounds, in random order: SIGKILL, SIGTERM, a full disk (a small tmpfs; left out where
mounting is not permitted), a killed loading worker, an utterance whose audio is NaN and one whose
file is garbage. A run that ends is started again by the same command. At least one round is made.
Prints one JSON line; exits with 1 when the losses differ by more than the undisturbed run's noise,
or when memory or file handles grow.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

import train_CTC
from modules.checkpoints import Checkpointer
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"
OPTIONS = {
    "num_workers": 1,
    "dropout": 0.1,
    "ckpt_interval_steps": 3,
    "avg_checkpoints": 1,
    "test_splits": "[test-a]",
}
FOREVER = 10**6
# Ends a life: (the status that tells so, or None for a signal's).
ENDS = {"kill": -signal.SIGKILL, "stop": 75, "full disk": 2}


class Run:
    """A training in a process of its own, forked after the imports, and what it is seen to hold."""

    def __init__(self, folder, data, workers, beside=None):
        self.folder, self.data, self.workers, self.beside = folder, data, workers, beside
        self.seen, self.recoveries, self.lives = [], [], 0

    def start(self, epochs=FOREVER):
        options = OPTIONS | {"number_of_epochs": epochs, "num_workers": self.workers}
        arguments = runs.arguments(CTC, self.folder, data_folder=self.data, **options)
        begun, self.lives = time.monotonic(), self.lives + 1
        before = self.log("log.txt").count("Going into epoch")
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            train(arguments, self.folder.with_suffix(".out"))
        while self.alive() and self.log("log.txt").count("Going into epoch") == before:
            time.sleep(0.02)
        self.recoveries.append(time.monotonic() - begun)

    def alive(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                self.look()
                return True
            self.status = os.waitstatus_to_exitcode(status)
        return False

    def look(self):
        """Note memory (MB) and file handles, of the run beside it too."""
        if self.beside is not None:
            self.beside.look()
        with contextlib.suppress(FileNotFoundError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            handles = len(os.listdir(f"/proc/{self.pid}/fd"))
            self.seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, handles))

    def log(self, name="train_log.txt"):
        path = self.folder / name
        return path.read_text(errors="replace") if path.is_file() else ""

    def losses(self):
        """Validation loss by epoch; of one that was logged again, the last."""
        found = {}
        for line in self.log().splitlines():
            if line.startswith("epoch: ") and "valid loss: " in line:
                epoch = int(line.split("epoch: ")[1].split(",")[0])
                found[epoch] = float(line.split("valid loss: ")[1].split(",")[0])
        return found

    def wait_for(self, epochs, seconds=600):
        """Until so many more epochs are logged: whether the process lives to see it."""
        until, deadline = len(self.losses()) + epochs, time.monotonic() + seconds
        while self.alive() and len(self.losses()) < until:
            assert time.monotonic() < deadline, f"no epoch in {seconds} s"
            time.sleep(0.05)
        return self.status is None

    def end(self, seconds=120):
        """Wait for its end: the status."""
        deadline = time.monotonic() + seconds
        while self.alive():
            assert time.monotonic() < deadline, f"it has not ended after {seconds} s"
            time.sleep(0.02)
        return self.status


def train(arguments, output):
    """What the child does; it never returns."""
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["train_CTC.py", *arguments]
    status = 1
    try:
        runs.launch.run(train_CTC.main, "train_CTC.py", CTC)
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)


# ---- Faults: each returns once the run has taken it, with a process that trains ----


def kill(run):
    os.kill(run.pid, signal.SIGKILL)
    return run.end()


def stop(run):
    os.kill(run.pid, signal.SIGTERM)
    return run.end()


def full_disk(run):
    filler = run.folder.parent / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    try:
        return run.end()
    finally:
        filler.unlink()


def worker(run):
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in children[:1]:
        os.kill(int(pid), signal.SIGKILL)
    run.wait_for(2)
    return run.status


def spoilt(spoil):
    """A fault that is in an utterance's file for at least an epoch."""

    def happen(run):
        path = random.choice(sorted(run.data.glob("train/1/1/*.flac")))
        whole = path.read_bytes()
        spoil(path)
        run.wait_for(2)
        path.write_bytes(whole)
        return run.status

    return happen


def nan(path):
    samples = np.full(sf.info(path).frames, np.nan, np.float32)
    with open(path, "wb") as file:  # the reader looks at what is in it, not at its name
        sf.write(file, samples, runs.RATE, format="WAV", subtype="FLOAT")


def garbage(path):
    path.write_bytes(random.randbytes(path.stat().st_size))


FAULTS = {
    "kill": kill,
    "stop": stop,
    "full disk": full_disk,
    "worker": worker,
    "NaN": spoilt(nan),
    "bad file": spoilt(garbage),
}


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 64 MB, if mounting is permitted: whether it is."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disturb(run, faults, minutes, every):
    """Rounds of faults: how often each came, and how often it ended the run."""
    counts = {name: [0, 0] for name in faults}
    deadline = time.monotonic() + 60 * minutes
    while True:
        for name in random.sample(sorted(faults), len(faults)):
            assert run.wait_for(1), f"it ended with {run.status} before {name}"
            begun = time.monotonic()
            status = faults[name](run)
            counts[name][0] += 1
            if status is not None:
                assert status == ENDS.get(name, status) != 0, f"{name}: status {status}"
                assert Checkpointer(run.folder / "save").find_checkpoint(), name
                counts[name][1] += 1
                if name not in ENDS:
                    said = run.folder.with_suffix(".out").read_text(errors="replace")
                    print(f"{name} ended the run:\n{said[-3000:]}", file=sys.stderr)
                run.start()
            while time.monotonic() < begun + every and run.alive():
                time.sleep(0.2)
        if time.monotonic() > deadline:
            return counts


def soak(place, minutes, every):
    data = shutil.copytree(runs.corpus(), place / "data")
    calm = Run(place / "calm", shutil.copytree(data, place / "calm_data"), workers=0)
    with small_disk(place / "disk") as mounted:
        run = Run(place / "disk/run", data, workers=1, beside=calm)
        faults = {n: f for n, f in FAULTS.items() if mounted or n != "full disk"}
        calm.start()
        calm.seen.clear()
        try:
            run.start()
            counts = disturb(run, faults, minutes, every)
            stop(run)
            epochs = max(run.losses()) + 5
            run.start(epochs)
            assert run.end() == 0, "the last life did not end well"
            assert calm.alive(), "the undisturbed run ended"
        finally:
            for process in (calm, run):
                if process.alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.end()
        return report(run, calm, counts, epochs)


def report(run, calm, counts, epochs):
    """The figures, and what is wrong with them."""
    ours, theirs = run.losses(), calm.losses()
    assert sorted(ours) == list(range(1, epochs + 1)), "an epoch is missing from the log"
    # Both had the same time; the undisturbed run has no worker to help it, so perhaps fewer epochs.
    common = min(epochs, max(theirs))
    last = range(max(1, common - 9), common + 1)
    means = [statistics.fmean(found[e] for e in last) for found in (ours, theirs)]
    noise = statistics.stdev(theirs[e] for e in last)
    wrong = []
    if abs(means[0] - means[1]) > 3 * noise + 0.02 * theirs[1]:
        wrong.append("loss")
    parts = quarters(calm.seen)
    if parts[1][0] > 1.1 * parts[0][0]:
        wrong.append("memory")
    if parts[1][1] > parts[0][1] + 2:
        wrong.append("file handles")
    return wrong, {
        "faults": {name: number for name, (number, _) in counts.items()},
        "ended the run": {name: ended for name, (_, ended) in counts.items()},
        "processes": run.lives,
        "epochs": epochs,
        "compared at": common,
        "valid loss": round(means[0], 3),
        "without faults": round(means[1], 3),
        "its deviation": round(noise, 3),
        "seconds to train again, median": round(statistics.median(run.recoveries[1:]), 2),
        "memory MB, early and late": [round(q[0], 1) for q in parts],
        "file handles, early and late": [q[1] for q in parts],
        "wrong": wrong,
    }


def quarters(seen):
    """Medians of the second and the last quarter of (memory, handles)."""
    n = max(1, len(seen) // 4)
    return [
        [statistics.median(column) for column in zip(*part, strict=True)]
        for part in (seen[n : 2 * n] or seen, seen[-n:])
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=60, help="seconds between faults")
    parser.add_argument("--folder", type=Path, help="kept when given; must be empty or new")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        wrong, figures = soak(place, options.minutes, options.every)
    print(json.dumps(figures))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
