"""Utterances to batches: dynamic or of fixed size, shuffled, shared out over processes."""

import hashlib
import math

from speechbrain.dataio.sampler import DynamicBatchSampler, ReproducibleRandomSampler
from torch.utils.data import BatchSampler, Sampler

from modules.errors import UserError


def train_batches(hparams, durations):
    """A sampler of batches of indices into `durations` (seconds), in another order every epoch."""
    if hparams["dynamic_batching"]:
        return DynamicBatchSampler(
            durations,
            hparams["max_batch_length_train"],
            num_buckets=hparams["num_buckets"],
            lengths_list=durations,
            shuffle=True,
            batch_ordering="random",
            max_batch_ex=hparams["max_batch_ex"],
            seed=hparams["seed"],
        )
    order = fixed_order(hparams, durations)
    return EpochBatchSampler(order, hparams["batch_size"], drop_last=False)


def shuffled_batches(hparams, durations, chosen, rng):
    """Batches of the chosen utterances alone, with little padding, in random order.

    Among those of a shard or some, DynamicBatchSampler's many classes would leave many small ones.
    """
    if not hparams["dynamic_batching"]:
        if hparams["sorting"] != "random":
            raise UserError(
                f"sorting={hparams['sorting']!r} is not for train_shards, which are read in random "
                "order; use random"
            )
        order = rng.sample(chosen, len(chosen))
        return pack(order, durations, most=hparams["batch_size"])
    # Not quite by length, so that the same are not always together.
    about = [durations[i] * rng.uniform(0.98, 1.02) for i in chosen]
    order = [i for _, i in sorted(zip(about, chosen, strict=True))]
    batches = pack(order, durations, hparams["max_batch_ex"], hparams["max_batch_length_train"])
    rng.shuffle(batches)
    return batches


def pack(order, durations, most=math.inf, seconds=math.inf):
    """Cut an order of utterances into batches of at most so many, and seconds with padding."""
    batches, longest = [[]], 0.0
    for i in order:
        longest = max(longest, durations[i])
        size = len(batches[-1])
        if size and (size == most or (size + 1) * longest > seconds):
            batches.append([])
            longest = durations[i]
        batches[-1].append(i)
    return batches


def fixed_order(hparams, durations):
    """The order of utterances for batches of fixed size; `sorting` names it."""
    sorting = hparams["sorting"]
    if sorting == "random":
        return ReproducibleRandomSampler(durations, seed=hparams["seed"])
    if sorting not in ("ascending", "descending"):
        raise UserError(f"sorting={sorting!r} is unknown; use random, ascending or descending")
    return sorted(range(len(durations)), key=durations.__getitem__, reverse=sorting == "descending")


class EpochBatchSampler(BatchSampler):
    """PyTorch's `BatchSampler` that tells its sampler the epoch."""

    def set_epoch(self, epoch):
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class WholeStepSampler(Sampler):
    """A rank's share of another sampler's batches, in whole optimizer steps.

    Rank r of n takes batches r, r + n, ...: n processes see, step by step, the batches that one
    process with n times the `grad_accumulation_factor` sees. The last step is filled from the
    first batches: all ranks take equally many, and no gradient is left over at an epoch's end.
    (SpeechBrain's wrapper fixes the number of batches at the start, but dynamic batches vary in
    number from epoch to epoch.)
    """

    def __init__(self, batch_sampler, accumulation=1, rank=0, world_size=1):
        self.batch_sampler, self.accumulation = batch_sampler, accumulation
        self.rank, self.world_size = rank, world_size
        self.batches = None  # the epoch's, of all ranks

    def __len__(self):
        steps = math.ceil(len(self.batch_sampler) / (self.world_size * self.accumulation))
        return steps * self.accumulation

    def __iter__(self):
        batches = list(self.batch_sampler if self.batches is None else self.batches)
        missing = -len(batches) % (self.world_size * self.accumulation)
        batches += [batches[i % len(batches)] for i in range(missing)]
        return iter(batches[self.rank :: self.world_size])

    def set_epoch(self, epoch):
        self.batch_sampler.set_epoch(epoch)
        # Once: SpeechBrain's sampler has another order when it is read again.
        self.batches = list(self.batch_sampler)

    @property
    def digest(self):
        """What tells the epoch's list of batches from any other."""
        return hashlib.sha256(str(self.batches).encode()).hexdigest()
