"""Manifests (CSV) to datasets, tokens and batches."""

import csv
import functools
import operator
import os
import shutil
from pathlib import Path

import speechbrain as sb
import torch

from librispeech_prepare import prepare_librispeech
from modules.batches import pack, shuffled_batches, train_batches
from modules.checkpoints import newest, resumable
from modules.datasets import EpochDataset
from modules.errors import UserError
from modules.language_model import fetch
from modules.launch import on_main
from modules.mixing import MixedBatchSampler, read_mix, times_per_epoch
from modules.randomness import seeded
from modules.resolved import plain_values
from modules.shards import ShardDataset, load_shards, shard_batches, shards_of
from modules.waveforms import Batch, KeptAudio, Unread
from modules.whole import whole


def prepare_manifests(hparams):
    """Write `<split>.csv` for every split, and the merged training manifest, on one process."""
    read_mix(hparams)  # its mistakes need not wait for the preparation
    keeps_train = shards_of(hparams) or evaluates_elsewhere(hparams)
    train_splits = () if keeps_train else hparams["train_splits"]
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


def evaluates_elsewhere(hparams):
    """Whether a run is evaluated with other data than it learnt from: its train.csv stays."""
    folder = Path(hparams["output_folder"])
    learnt = folder / "hyperparams.yaml"
    if not (hparams["skip_train"] and learnt.is_file() and (folder / "train.csv").is_file()):
        return False
    there, splits = plain_values(learnt, "data_folder", "train_splits")
    places = [os.path.abspath(str(place)) for place in (there, hparams["data_folder"])]
    return places[0] != places[1] or splits != list(hparams["train_splits"])


def load_manifest(path, hparams):
    """Read one CSV as a dataset; UserError when it is missing or empty."""
    if not Path(path).is_file():
        raise UserError(
            f"the manifest {path} is missing; run without --skip_prep, or check --train_splits, "
            "--dev_splits and --test_splits"
        )
    replacements = {"data_root": str(hparams["data_folder"])}
    try:
        dataset = EpochDataset.from_csv(csv_path=str(path), replacements=replacements)
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} is no manifest, whose columns are ID, duration, wav, spk_id and wrd: {error}"
        ) from None
    if len(dataset) == 0:
        raise UserError(f"the manifest {path} holds no utterance")
    return dataset


def load_datasets(hparams):
    """Read the manifests: (train, valid, {test split: dataset})."""
    folder = Path(hparams["output_folder"])
    shards = shards_of(hparams)
    train = load_shards(hparams) if shards else load_manifest(hparams["train_csv"], hparams)
    valid = load_manifest(folder / f"{hparams['dev_splits'][0]}.csv", hparams)
    for split in hparams["dev_splits"][1:]:
        more = load_manifest(folder / f"{split}.csv", hparams)
        if twice := sorted(valid.data.keys() & more.data.keys()):
            raise UserError(
                f"{len(twice)} ids of {split} are in another of the dev_splits too, such as "
                f"{', '.join(twice[:3])}; rename them, or validate on one of the splits"
            )
        valid.data.update(more.data)
        valid.data_ids.extend(more.data_ids)
    tests = {
        split: load_manifest(folder / f"{split}.csv", hparams) for split in hparams["test_splits"]
    }
    return train, valid, tests


def add_pipelines(hparams, train, valid, tests, text_pipeline, text_keys):
    """Attach audio and text pipelines; training audio is speed-perturbed.

    An utterance's speed is drawn by seed, epoch, id and, of `train_mix`, which time of the epoch it
    is, in whichever worker and order it is read.
    Of a file that cannot be read, `sig` is an Unread, which batches leave out.
    text_pipeline (transcript) yields a value a key of text_keys; `wrd` stays beside them.
    """
    # Files of before the key was there keep nothing.
    audio = KeptAudio(hparams["sample_rate"], hparams.get("audio_cache_mb", 0))

    @sb.utils.data_pipeline.takes("wav", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def read(wav, duration):
        return audio.read(wav, float(duration))

    @sb.utils.data_pipeline.takes("id", "copy", "wav", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def read_perturbed(utterance, copy, wav, duration):
        sig = read(wav, duration)
        if isinstance(sig, Unread):
            return sig
        with seeded(hparams["seed"], train.epoch, utterance, *([copy] if copy else [])):
            return hparams["speed_perturb"](sig.unsqueeze(0)).squeeze(0)

    takes = sb.utils.data_pipeline.takes("wrd")
    text = takes(sb.utils.data_pipeline.provides(*text_keys)(text_pipeline))
    train.add_dynamic_item(read_perturbed)
    for dataset in (valid, *tests.values()):
        dataset.add_dynamic_item(read)
    for dataset in (train, valid, *tests.values()):
        dataset.audio_files = audio
        dataset.add_dynamic_item(text)
        dataset.set_output_keys(["id", "sig", "wrd", *text_keys])


def keep_audio(*datasets):
    """Decode now what every epoch reads, as far as `audio_cache_mb` holds whole datasets."""
    for dataset in datasets:
        if not isinstance(dataset, ShardDataset):
            rows = [dataset.data[i] for i in dataset.data_ids]
            dataset.audio_files.keep([(row["wav"], float(row["duration"])) for row in rows])


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
        # PyTorch draws the workers' seeds; with its own generator, not with that of dropout.
        "generator": torch.Generator(),
    }
    if workers:
        # To start them anew takes longer than an epoch of a small corpus.
        options |= {"worker_init_fn": start_worker, "persistent_workers": True}
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
            source = newest(resumable(hparams["resume"])).path.parent / path.name
            if not source.is_file():
                raise UserError(
                    f"resume={hparams['resume']}: {source} is missing, whose units its weights "
                    "speak; copy it there from the run that wrote the checkpoint"
                )
            with whole(path) as beside:
                shutil.copyfile(source, beside)
        elif source is None:
            tokenizer.train([train.data[i]["wrd"] for i in train.data_ids], path)
        else:
            fetch(source, "tokenizer.ckpt", path)

    on_main(fetch_or_train)
    tokenizer.load(path)
