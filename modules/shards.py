"""Training from tar shards: an epoch's batches, planned so that every shard is read as a stream.

The manifest tells what is in which shard, so the batches of an epoch are known before anything is
read. That makes them the same for any number of workers, lets a stopped run go on where it was,
and shares them out over processes as those of a folder are. (SpeechBrain's loader cannot save its
place in WebDataset's own iterable pipelines.) A worker reads a shard from start to end, once.
"""

import heapq
import itertools
import logging
import math
import os
import random
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
from speechbrain.dataio.dataio import load_data_csv
from torch.utils.data import Sampler

from modules.corpus.shards import key_of, webdataset
from modules.datasets import Copy, EpochDataset, without_utterances
from modules.errors import UserError
from modules.resolved import plain_values
from modules.waveforms import Unread

logger = logging.getLogger(__name__)


def shards_of(hparams):
    """The folder of shards that a run learns from or, where it is evaluated, learnt; None: files.

    Its own hyperparams.yaml, or that of the run it resumes, knows what was learnt from: the first
    that is a training's. They are read as plain data, as a checkpoint may be a stranger's.
    """
    if hparams.get("train_shards") or not hparams["skip_train"]:
        return hparams.get("train_shards")
    places, resume = [Path(hparams["output_folder"])], hparams.get("resume")
    if resume:  # an output folder, its save folder, or a checkpoint in that
        places += [Path(resume), *Path(resume).absolute().parents[:2]]
    files = (place / "hyperparams.yaml" for place in places)
    for path in filter(Path.is_file, files):
        shards, only_evaluates = plain_values(path, "train_shards", "skip_train")
        if shards or not only_evaluates:
            return shards
    return None


def load_shards(hparams):
    """The training splits' manifests in a folder of shards, as one dataset.

    UserError where one is missing; but an evaluation does without them, and has no utterance.
    """
    folder, data = Path(shards_of(hparams)), {}
    if hparams["skip_train"]:
        if not all((folder / f"{split}.csv").is_file() for split in hparams["train_splits"]):
            return without_utterances()
    else:
        webdataset()
    for split in hparams["train_splits"]:
        path = folder / f"{split}.csv"
        if not path.is_file():
            raise UserError(
                f"train_shards has no manifest {path}; write it with librispeech_prepare.py "
                f"--train {split} --shards {folder}"
            )
        part = load_data_csv(str(path))
        if twice := data.keys() & part.keys():
            raise UserError(f"{path}: {len(twice)} ids are in another split too, as {min(twice)}")
        data |= part
    lanes = hparams["shard_streams"] / (processes() * max(1, hparams["num_workers"]))
    # One window more, so that none is dropped while it is in use.
    return ShardDataset(data, folder, hparams["shard_window"] * (math.ceil(lanes) + 1))


def shard_batches(hparams, dataset, cut, times):
    """The sampler of an epoch's batches; `cut` as ShardBatchSampler's, times one an utterance."""
    streams = hparams["shard_streams"]
    if streams % processes():
        raise UserError(
            f"shard_streams={streams} is no multiple of the {processes()} processes; a good number "
            "is processes x num_workers"
        )
    shards = defaultdict(list)
    for i, name in enumerate(dataset.data_ids):
        shards[dataset.data[name]["wav"]].append(i)
    return ShardBatchSampler(
        list(shards.values()),
        cut,
        [times[indices[0]] if times else 1 for indices in shards.values()],
        streams,
        hparams["shard_window"],
        hparams["seed"],
        hparams["grad_accumulation_factor"] * processes(),
    )


def processes():
    """How many train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class ShardDataset(EpochDataset):
    """Utterances whose `wav` names the shard that they are in; pipelines get its bytes instead.

    Arguments
    ---------
    data : dict
        As SpeechBrain's, {id: {"wav": shard, ...}}.
    folder : path
        Where the shards are whose names are no URLs (`https:`, `pipe:` ...).
    capacity : int
        Shards that are held in memory at a time.
    """

    def __init__(self, data, folder, capacity):
        super().__init__(data)
        self.folder, self.capacity = str(folder), capacity
        self.cache, self.cached_in = OrderedDict(), 0  # the shard that was used last at the end

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The examples of a batch."""
        return [self.example(i, wav=self.audio(self.data_ids[i])) for i in indices]

    def audio(self, name):
        """The bytes of an utterance's audio file, or Unread."""
        shard = self.data[name]["wav"]
        if self.cached_in != self.epoch:  # what could not be read is tried again
            self.cache.clear()
            self.cached_in = self.epoch
        if shard not in self.cache:
            if len(self.cache) >= self.capacity:
                self.cache.popitem(last=False)
            self.cache[shard] = self.read(shard)
        self.cache.move_to_end(shard)
        found, why = self.cache[shard]
        missing = Unread(f"{shard}: {why or 'it is not in there'}", 16000)
        return found.get(key_of(name), missing)

    def read(self, shard):
        """({key: audio's bytes}, why it broke off or None)."""
        is_url = ":" in shard
        url = shard if is_url else os.path.join(self.folder, shard)
        samples, found = (
            webdataset().WebDataset(
                # Which worker reads what is planned already.
                [url],
                shardshuffle=False,
                nodesplitter=None,
                workersplitter=None,
            ),
            {},
        )
        try:
            for sample in samples:
                (kind,) = (k for k in sample if not k.startswith("__") and k != "txt")
                found[sample["__key__"]] = sample[kind]
        except Exception as error:  # tarfile's, the system's, an opener's: all cost the shard
            logger.warning("shard %s cannot be read: %s", url, error)
            return found, f"it cannot be read ({error})"
        return found, None


class ShardBatchSampler(Sampler):
    """The batches of an epoch: shards in random order, a window of some shuffled at a time.

    Shards are dealt to `streams`, which take turns: batch i is of stream i modulo `streams`. So
    with as many streams as there are workers in all processes, each worker has shards of its own.
    All streams have equally many batches, and together whole optimizer steps of `step` batches:
    where one has fewer, its largest are halved. Nothing is left out, and nothing comes twice.

    Arguments
    ---------
    shards : list of lists of int
        Which utterances are in each shard.
    cut : callable
        (indices, random.Random) -> batches, as lists of indices.
    times : list of numbers
        How often each shard comes in an epoch; fractions are drawn.
    streams, window : int
    seed : int
    step : int
        Batches of an optimizer step, in all processes.
    """

    def __init__(self, shards, cut, times, streams, window, seed, step=1):
        if len(shards) < streams:
            raise UserError(
                f"{len(shards)} shards are too few for shard_streams={streams}; write smaller ones "
                "(--shard-megabytes), or lower --shard_streams"
            )
        self.shards, self.cut, self.times = shards, cut, times
        self.streams, self.window = streams, window
        self.seed, self.step = seed, step
        self.set_epoch(0)

    def set_epoch(self, epoch):
        """Plan an epoch."""
        rng = random.Random(f"{self.seed} {epoch}")
        order = [(i, copy) for i, count in enumerate(self.counts(rng)) for copy in range(count)]
        rng.shuffle(order)
        streams = [
            [
                batch
                for window in self.windows(order[number :: self.streams], number)
                for batch in self.cut(
                    [Copy(i, copy) for shard, copy in window for i in self.shards[shard]], rng
                )
            ]
            for number in range(self.streams)
        ]
        whole = self.step // math.gcd(self.step, self.streams)
        count = math.ceil(max(map(len, streams)) / whole) * whole
        streams = [halve(batches, count) for batches in streams]
        self.batches = [batch for turn in zip(*streams, strict=True) for batch in turn]

    def counts(self, rng):
        """How often each shard comes; together at least once for every stream."""
        wanted = [n + rng.random() for n in self.times]
        counts = [math.floor(n) for n in wanted]
        left = sorted((i for i, count in enumerate(counts) if not count), key=wanted.__getitem__)
        while sum(counts) < self.streams:
            counts[left.pop()] = 1
        return counts

    def windows(self, shards, number):
        """Cut a stream's shards; the first window is shorter, so that streams wait by turns."""
        first = math.ceil(self.window * (number + 1) / self.streams)
        ends = [0, *range(first, len(shards), self.window), len(shards)]
        return [shards[a:b] for a, b in itertools.pairwise(ends) if a < b]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def halve(batches, count):
    """As many batches as `count`, by halving the largest where they stand."""
    parts = [[batch] for batch in batches]
    largest = [(-len(batch), i) for i, batch in enumerate(batches)]
    heapq.heapify(largest)
    for _ in range(count - len(batches)):
        size, i = heapq.heappop(largest)
        if size > -2:
            raise UserError(
                f"the shards of a stream have too few utterances for {count} batches; lower "
                "--shard_streams, or write smaller shards (--shard-megabytes)"
            )
        at = max(range(len(parts[i])), key=lambda part: len(parts[i][part]))
        whole = parts[i][at]
        parts[i][at : at + 1] = whole[: len(whole) // 2], whole[len(whole) // 2 :]
        heapq.heappush(largest, (-max(map(len, parts[i])), i))
    return [batch for part in parts for batch in part]
