"""Training splits in other proportions than their sizes: how often an utterance comes an epoch."""

import csv
from pathlib import Path

import torch
import yaml
from torch.utils.data import Sampler

from modules.datasets import Copy
from modules.errors import UserError
from modules.shards import shards_of

EXAMPLE = "{train-clean-100: 10, synth-100: 1}"


def read_mix(hparams):
    """`train_mix` as {split: times an epoch}, empty when there is none; UserError if amiss."""
    mix = hparams.get("train_mix")  # older files have none
    if isinstance(mix, str):  # of the command line
        try:
            mix = yaml.safe_load(mix)
        except yaml.YAMLError:
            raise UserError(f"train_mix={mix!r} is no YAML; an example is {EXAMPLE}") from None
    if mix is None:
        return {}
    if not isinstance(mix, dict):
        raise UserError(f"train_mix={mix!r} must say how often each split comes, as {EXAMPLE}")
    for split, times in mix.items():
        if split not in hparams["train_splits"]:
            raise UserError(
                f"train_mix has {split!r}, which is not among "
                f"train_splits={list(hparams['train_splits'])}; name it there too"
            )
        if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times < 10000:
            raise UserError(
                f"train_mix: {split} has {times!r}; expected a number above 0: how often its "
                "utterances come in an epoch"
            )
    return mix


def times_per_epoch(hparams, dataset):
    """How often every utterance of a training dataset comes in an epoch: [number], or None."""
    mix = read_mix(hparams)
    if not mix or not len(dataset):
        return None
    times = {}
    for split, number in mix.items():
        folder = shards_of(hparams) or hparams["output_folder"]
        path = Path(folder) / f"{split}.csv"
        try:
            with open(path, encoding="utf-8", newline="") as file:
                found = [row["ID"] for row in csv.DictReader(file)]
        except FileNotFoundError:
            raise UserError(
                f"train_mix needs the manifest {path} to know the utterances of {split}; run "
                "without --skip_prep"
            ) from None
        times |= dict.fromkeys(found, number)
    if unknown := times.keys() - dataset.data.keys():
        raise UserError(
            f"train_mix: {len(unknown)} utterances of {', '.join(mix)} are not in "
            f"train_csv={hparams['train_csv']}, such as {min(unknown)}"
        )
    return [times.get(name, 1) for name in dataset.data_ids]


class MixedBatchSampler(Sampler):
    """Batches of an epoch in which utterance i comes `times[i]` times.

    2.3 times are twice, and once more in 3 of 10 epochs. Which utterances those are is drawn by
    seed and epoch, so the same epoch has the same batches whenever it is asked for.

    Arguments
    ---------
    make_batches : callable
        Indices [i, ...] -> a batch sampler over their positions in that list.
    times : list of numbers
    seed : int
    """

    def __init__(self, make_batches, times, seed):
        self.make_batches, self.seed = make_batches, seed
        self.times = torch.tensor(times, dtype=torch.float64)
        self.set_epoch(0)

    def set_epoch(self, epoch):
        """Draw the utterances of an epoch, and batches of them."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        luck = torch.rand(len(self.times), generator=generator, dtype=torch.float64)
        counts = (self.times + luck).floor().long()
        if not counts.any():  # of very small fractions; an epoch has a batch
            counts[(self.times + luck).argmax()] = 1
        self.chosen = [
            Copy(i, copy) for i, count in enumerate(counts.tolist()) for copy in range(count)
        ]
        self.batches = self.make_batches(self.chosen)
        self.batches.set_epoch(epoch)

    def __iter__(self):
        return ([self.chosen[i] for i in batch] for batch in self.batches)

    def __len__(self):
        return len(self.batches)
