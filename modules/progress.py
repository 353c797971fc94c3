"""What a checkpoint holds of a training besides weights and the optimizer's state."""

import time
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)


@register_checkpoint_hooks
class RankStates:
    """What each process has of its own, as plain data: [state of rank 0, of rank 1, ...]."""

    def __init__(self):
        self.states = []

    @mark_as_saver
    def save(self, path):
        torch.save(self.states, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.states = torch.load(path, weights_only=True)


@register_checkpoint_hooks
class Clock:
    """Minutes that a training takes, all its processes together; nan where some are not known.

    It goes on from the checkpoint that is read: work that was done and not saved does not count.
    """

    def __init__(self):
        self.before, self.since = 0.0, time.monotonic()

    @property
    def minutes(self):
        return self.before + (time.monotonic() - self.since) / 60

    @mark_as_saver
    def save(self, path):
        Path(path).write_text(f"{self.minutes}\n", encoding="utf-8")

    @mark_as_loader
    def load(self, path, end_of_epoch):
        self.before = float(Path(path).read_text(encoding="utf-8"))
        self.since = time.monotonic()
