"""Kill -9 processes that save checkpoints, each at another moment, and look at what is left.

usage: python -m tests.recipes.killed_saves FOLDER ROUNDS

Prints in how many rounds a folder was left half-written or half-deleted.
"""

import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch

from modules.checkpoints import PARTIAL, Checkpointer


def parts():
    """A model and a second file, a few milliseconds of writing."""
    return {"model": torch.nn.Linear(512, 512), "other": torch.nn.Linear(512, 512)}


def fill(recoverables, number):
    for module in recoverables.values():
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, number)


def save_forever(folder, first, pipe):
    """Save number after number, and tell each that is saved."""
    recoverables = parts()
    checkpointer, number = Checkpointer(folder, recoverables), first
    while True:
        fill(recoverables, number)
        checkpointer.save_and_keep_only(num_to_keep=2, keep_recent=True, importance_keys=[])
        os.write(pipe, b".")
        number += 1


def kill_one(folder, last):
    """Let a process save from `last` on, and kill it: the last number that it told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(folder, last + 1, writer)
    os.close(writer)
    select.select([reader], [], [], 30)  # until its first is saved
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = 0
    while data := os.read(reader, 4096):
        told += len(data)
    os.close(reader)
    return last + told


def recover(folder):
    """The number in the newest checkpoint, which all of its weights have."""
    recoverables = parts()
    assert Checkpointer(folder, recoverables).recover_if_possible() is not None
    (number,) = {
        value
        for module in recoverables.values()
        for parameter in module.parameters()
        for value in parameter.unique().tolist()
    }
    return int(number)


def main(folder, rounds):
    random.seed(1)
    torch.set_num_threads(1)
    last = left = 0
    for _ in range(rounds):
        told = kill_one(folder, last)
        last = recover(folder)
        # It may have been killed after it saved and before it told.
        assert told <= last <= told + 1, (told, last)
        left += any(p.name.startswith(PARTIAL) for p in folder.iterdir())
        assert 1 <= len(list(folder.glob("CKPT+*"))) <= 3
    Checkpointer(folder, parts()).save_checkpoint()
    assert not list(folder.glob(f"{PARTIAL}*"))
    print(left)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
