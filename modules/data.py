"""Manifests (CSV) to datasets, tokens and batches."""

import functools
import math
import operator
import os
import shutil
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler, ReproducibleRandomSampler
from torch.utils.data import BatchSampler, Sampler

from librispeech_prepare import prepare_librispeech
from modules.checkpoints import newest, resumable
from modules.errors import UserError
from modules.language_model import fetch
from modules.launch import on_main
from modules.mixing import MixedBatchSampler, read_mix, times_per_epoch
from modules.randomness import seeded
from modules.shards import load_shards, shard_batches
from modules.waveforms import Batch, Unread, read_audio
from modules.whole import whole


def prepare_manifests(hparams):
    """Write `<split>.csv` for every split, and the merged training manifest, on one process."""
    read_mix(hparams)  # its mistakes need not wait for the preparation
    train_splits = () if hparams.get("train_shards") else hparams["train_splits"]
    on_main(
        prepare_librispeech,
        hparams["data_folder"],
        hparams["output_folder"],
        train_splits,
        hparams["dev_splits"],
        hparams["test_splits"],
        merge_lst=train_splits,
        merge_name="train.csv",
        skip_prep=hparams["skip_prep"],
        sample_rate=hparams["sample_rate"],
        max_seconds=hparams["max_seconds"],
        max_bad_fraction=hparams["max_bad_fraction"],
        # CTC can spell no other; subword units are learnt from whatever there is.
        allowed_characters=hparams.get("alphabet"),
    )


def load_manifest(path, hparams):
    """Read one CSV as a dataset; UserError when it is missing or empty."""
    if not Path(path).is_file():
        raise UserError(
            f"the manifest {path} is missing; run without --skip_prep, or check --train_splits, "
            "--dev_splits and --test_splits"
        )
    dataset = DynamicItemDataset.from_csv(
        csv_path=str(path), replacements={"data_root": str(hparams["data_folder"])}
    )
    if len(dataset) == 0:
        raise UserError(f"the manifest {path} holds no utterance")
    return dataset


def load_datasets(hparams):
    """Read the manifests: (train, valid, {test split: dataset})."""
    folder = Path(hparams["output_folder"])
    shards = hparams.get("train_shards")
    train = load_shards(hparams) if shards else load_manifest(hparams["train_csv"], hparams)
    valid = load_manifest(folder / f"{hparams['dev_splits'][0]}.csv", hparams)
    for split in hparams["dev_splits"][1:]:
        more = load_manifest(folder / f"{split}.csv", hparams)
        valid.data.update(more.data)
        valid.data_ids.extend(more.data_ids)
    tests = {
        split: load_manifest(folder / f"{split}.csv", hparams) for split in hparams["test_splits"]
    }
    return train, valid, tests


def add_pipelines(hparams, train, valid, tests, text_pipeline, text_keys):
    """Attach audio and text pipelines; training audio is speed-perturbed.

    An utterance's speed is drawn by seed, epoch and id, in whichever worker and order it is read.
    Of a file that cannot be read, `sig` is an Unread, which batches leave out.
    text_pipeline (transcript) yields a value a key of text_keys; `wrd` stays beside them.
    """

    @sb.utils.data_pipeline.takes("wav", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def read(wav, duration):
        return read_audio(wav, hparams["sample_rate"], float(duration))

    @sb.utils.data_pipeline.takes("id", "wav", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def read_perturbed(utterance, wav, duration):
        sig = read(wav, duration)
        if isinstance(sig, Unread):
            return sig
        # Workers are started anew in every epoch, so they know which it is.
        with seeded(hparams["seed"], hparams["epoch_counter"].current, utterance):
            return hparams["speed_perturb"](sig.unsqueeze(0)).squeeze(0)

    takes = sb.utils.data_pipeline.takes("wrd")
    text = takes(sb.utils.data_pipeline.provides(*text_keys)(text_pipeline))
    train.add_dynamic_item(read_perturbed)
    for dataset in (valid, *tests.values()):
        dataset.add_dynamic_item(read)
    for dataset in (train, valid, *tests.values()):
        dataset.add_dynamic_item(text)
        dataset.set_output_keys(["id", "sig", "wrd", *text_keys])


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

    def __len__(self):
        steps = math.ceil(len(self.batch_sampler) / (self.world_size * self.accumulation))
        return steps * self.accumulation

    def __iter__(self):
        batches = list(self.batch_sampler)
        missing = -len(batches) % (self.world_size * self.accumulation)
        batches += [batches[i % len(batches)] for i in range(missing)]
        return iter(batches[self.rank :: self.world_size])

    def set_epoch(self, epoch):
        self.batch_sampler.set_epoch(epoch)


def train_loader_options(hparams, dataset):
    """DataLoader arguments for training: the batch sampler and the workers."""
    durations = durations_of(dataset)

    def make_batches(chosen):
        return train_batches(hparams, [durations[i] for i in chosen])

    times = times_per_epoch(hparams, dataset)
    if hparams.get("train_shards"):
        cut = functools.partial(shuffled_batches, hparams, durations)
        sampler = shard_batches(hparams, dataset, cut, times)
    elif times is None:
        sampler = make_batches(range(len(durations)))
    else:
        sampler = MixedBatchSampler(make_batches, times, hparams["seed"])
    return {"batch_sampler": sampler, **worker_options(hparams)}


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


def eval_loader_options(hparams, dataset, seconds=None):
    """DataLoader arguments for validation and test: batches of similar lengths.

    seconds bounds a batch's audio; without it `test_batch_size` utterances make a batch.
    """
    durations = durations_of(dataset)
    order = sorted(range(len(durations)), key=durations.__getitem__)
    if seconds is None:
        batches = pack(order, durations, most=hparams["test_batch_size"])
    else:
        batches = pack(order, durations, seconds=seconds)
    return {"batch_sampler": batches[::-1], **worker_options(hparams)}


def worker_options(hparams):
    workers = hparams["num_workers"]
    options = {
        "num_workers": workers,
        "collate_fn": Batch,
        "pin_memory": False,
        # PyTorch draws the workers' seeds; with its own generator, not with that of dropout.
        "generator": torch.Generator(),
    }
    if workers:
        options["worker_init_fn"] = start_worker
    return options


def start_worker(worker):
    """One thread a worker: they only decode and resample, and share the cores with training.

    Signals to the run's group of processes, as Ctrl-C is, are not for them: the batches that they
    are at are wanted until training has saved a checkpoint.
    """
    torch.set_num_threads(1)
    os.setsid()


def durations_of(dataset):
    """Seconds of every utterance, in the order of its index."""
    return [float(dataset.data[i]["duration"]) for i in dataset.data_ids]


def hours(dataset, times=None):
    """Hours of audio in a dataset, where utterance i counts `times[i]`."""
    durations = durations_of(dataset)
    return sum(map(operator.mul, durations, times or [1] * len(durations))) / 3600


def prepare_tokenizer(hparams, train):
    """Load or train the subword tokenizer, once, and check the head against it."""
    tokenizer = hparams["tokenizer"]
    path = Path(hparams["save_folder"]) / "tokenizer.model"

    def fetch_or_train():
        if path.is_file():
            return
        os.makedirs(path.parent, exist_ok=True)
        source = hparams["pretrained_lm_tokenizer_path"]
        if hparams["resume"]:
            # The weights to go on from speak the units of their own run.
            with whole(path) as beside:
                source = newest(resumable(hparams["resume"])).path.parent / path.name
                shutil.copyfile(source, beside)
        elif source is None:
            tokenizer.train([train.data[i]["wrd"] for i in train.data_ids], path)
        else:
            fetch(source, "tokenizer.ckpt", path)

    on_main(fetch_or_train)
    tokenizer.load(path)
