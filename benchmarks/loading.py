"""The training run of train_S2S.py from audio on disk: its share of the bare step's throughput.

    python benchmarks/loading.py --data_folder /data/LibriSpeech --num_workers 12
    python benchmarks/loading.py --synthetic 200
    python benchmarks/loading.py --synthetic 8 --recipe hparams/S2S/conmamba_tiny.yaml --steps 2

The recipe's own preparation, dataloader and fit loop run until `--steps` steps are timed; first it
warms up and uses up what the workers fetched ahead while it did. Then the batches of the timed
steps, still on the device, are stepped through again without a loader: the bare step, with the
recipe's augmentation of features and without.

The corpus may be small: its utterances are repeated until an epoch outlasts the benchmark. Its
files then come from the page cache, as those of a corpus on a fast disk would.
Other options are given to the recipe: `--train_splits [train-clean-5]`, `--num_workers 12`.

With `--compile --compile_mode reduce-overhead` give `--warm_up 600` or more: a shape of batches is
recorded when it comes again, which takes as long as many steps. recorded counts the graphs that the
timed steps had to record, new those that had no graph, as their shape was new: both should be 0.

audio_s_per_s counts audio without padding. share is the throughput from disk over the row's.
The last line is everything as JSON, with the longest times between the ends of two steps, for the
host: some long ones are a file or a graph that came late, many are a loader that does not keep up.
"""

import argparse
import csv
import functools
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules import launch
from modules.command import count, plain_errors
from modules.data import prepare_manifests, train_loader_options
from modules.lengths import absolute
from train_S2S import ASR, dataio_prepare

RATE = 16000
SPLIT = "noise"
PREFETCH = 2  # batches that PyTorch's DataLoader fetches ahead for every worker


# ---- The corpus ----


def pseudo_words(number, seed=0):
    """Random words of a few letters: no word list is needed, and any tokenizer can be trained."""
    generator = random.Random(seed)
    return [
        "".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=generator.randint(2, 7)))
        for _ in range(number)
    ]


def write_noise(folder, index):
    """A FLAC file of 10 to 16 s; its line of the transcripts, which gives the tokens of speech."""
    generator = np.random.default_rng(index)
    seconds = generator.uniform(10, 16)
    name = f"1-1-{index:06d}"
    noise = 0.1 * generator.standard_normal(int(seconds * RATE), dtype=np.float32)
    sf.write(folder / f"{name}.flac", noise, RATE)
    return f"{name} {' '.join(pseudo_words(int(1.5 * seconds), seed=index))}\n"


def write_corpus(data_folder, number):
    """Noise in LibriSpeech's layout."""
    folder = Path(data_folder) / SPLIT / "1" / "1"
    folder.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        lines = list(pool.map(functools.partial(write_noise, folder), range(number), chunksize=8))
    (folder / "1-1.trans.txt").write_text("".join(lines))


def train_tokenizer(hparams):
    """Train the recipe's tokenizer on the transcripts and, should they be too few, on more words.

    A benchmark's corpus may be too small for the recipe's number of units, which the cost of the
    heads and losses depends on.
    """
    with open(hparams["train_csv"], encoding="utf-8", newline="") as f:
        texts = [row["wrd"] for row in csv.DictReader(f)]
    words = pseudo_words(4 * hparams["output_neurons"])
    more = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    path = Path(hparams["save_folder"]) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    hparams["tokenizer"].train(texts * 10 + more, path)


def repeat(dataset, seconds):
    """Repeat a dataset's utterances under new names until it lasts so long."""
    rows = list(dataset.data.items())
    once = sum(float(row["duration"]) for _, row in rows)
    for i in range(1, int(seconds / once) + 1):
        dataset.data.update({f"{name}-{i}": row for name, row in rows})
    dataset.data_ids = list(dataset.data)


# ---- The run ----


class TimedASR(ASR):
    """The recipe's Brain with a stopwatch: keeps the batches of the timed steps, then stops."""

    def watch(self, warm_up, steps, limit):
        self.warm_up, self.steps, self.limit = warm_up, steps, limit
        self.kept, self.seen = [], 0

    def fit_batch(self, batch):
        batch = self.on_device(batch)
        loss = super().fit_batch(batch)
        self.seen += 1
        if self.seen == self.warm_up // 2:
            # Where most of a training happens: the features' statistics no longer change. Before,
            # the host waits for the device in every step.
            counter = self.hparams.epoch_counter
            counter.current = max(counter.current, self.hparams.normalize_until_epoch)
        if self.seen == self.warm_up:
            make_room(batch, self.steps, self.on_device.stream)
            measure.synchronize(self.device)
            self.started, self.before, self.ends = time.perf_counter(), shapes_of(self), []
        elif self.seen > self.warm_up:
            self.kept.append(batch)
            self.ends.append(time.perf_counter())
            late = time.perf_counter() - self.started > self.limit
            if late or len(self.kept) == self.steps:
                measure.synchronize(self.device)
                self.seconds = time.perf_counter() - self.started
                self.found = since(self.before, self)
                self.optimizer_step_limit = 0  # SpeechBrain's loop ends before its next batch
        return loss


def make_room(batch, number, stream):
    """Let PyTorch's allocator have the memory of so many batches, as a training would by now.

    A training keeps no batch. The benchmark does, and every one would ask the driver for memory,
    for which the host may wait. 150 steps of 500 s are 7 GB.
    """
    x = batch.sig.data
    if x.is_cuda:
        with torch.cuda.stream(stream):
            torch.empty(number * x.numel() * 3 // 2, dtype=x.dtype, device=x.device)


def audio_seconds(batches, rate):
    """-> seconds of audio, seconds with the padding"""
    whole = sum(b.sig.data.numel() for b in batches)
    audio = sum(absolute(b.sig.lengths, b.sig.data.shape[1]).sum().item() for b in batches)
    return audio / rate, whole / rate


def shapes_of(brain):
    """How many shapes of batches have a CUDA graph, and how many it has seen."""
    graphs = brain.graphs
    return (len(graphs.graphs), len(graphs.seen)) if graphs is not None else (0, 0)


def since(before, brain):
    """-> {"recorded": graphs, "new": shapes} of which there were none before"""
    recorded, new = np.subtract(shapes_of(brain), before).tolist()
    return {"recorded": recorded, "new": new}


def time_bare(brain, batches):
    """Seconds that the steps of the kept batches take without a loader, and `since`."""
    brain.modules.train()
    # A graph is recorded when a shape comes for the second time.
    for some in (batches, batches, batches) if shapes_of(brain)[0] else (batches[:2], batches):
        started, before = time.perf_counter(), shapes_of(brain)
        for batch in some:
            brain.step += 1
            ASR.fit_batch(brain, batch)
        measure.synchronize(brain.device)
    return time.perf_counter() - started, since(before, brain)


def run(options, recipe_options, folder):
    """Yield a row for the run from disk and for either bare step."""
    recipe_options = [
        f"--output_folder={folder}/output",
        f"--device={options.device}",
        *recipe_options,
    ]
    if options.synthetic:
        write_corpus(f"{folder}/data", options.synthetic)
        recipe_options.append(f"--data_folder={folder}/data")
        recipe_options += [f"--{k}_splits=[{SPLIT}]" for k in ("train", "dev", "test")]
    else:
        recipe_options.append(f"--data_folder={options.data_folder}")
    _, hparams, run_opts, _ = launch.start([options.recipe, *recipe_options])
    os.makedirs(hparams["output_folder"], exist_ok=True)
    prepare_manifests(hparams)
    train_tokenizer(hparams)
    train, _, _ = dataio_prepare(hparams)

    warm_up = options.warm_up + PREFETCH * hparams["num_workers"]
    # An epoch much longer than what is timed: every bucket of lengths ends in a batch that is not
    # full, and in a short epoch these would be many.
    repeat(train, 8 * (warm_up + options.steps) * hparams["max_batch_length_train"])
    brain = TimedASR(hparams, run_opts)
    brain.noprogressbar = True
    brain.watch(warm_up, options.steps, options.limit)
    # Without a validation set nothing is validated, and no checkpoint is written.
    loader_options = train_loader_options(hparams, train)
    brain.fit(hparams["epoch_counter"], train, None, train_loader_kwargs=loader_options)

    audio, whole = audio_seconds(brain.kept, hparams["sample_rate"])
    shared = {"workers": hparams["num_workers"], "steps": len(brain.kept),
              "padding": round(1 - audio / whole, 4)}  # fmt: skip
    augmented = time_bare(brain, brain.kept)
    hparams["fea_augment"].augment_prob = 0.0
    plain = time_bare(brain, brain.kept)
    slowest = np.sort(np.diff([brain.started, *brain.ends]))[::-1] * 1e3
    for what, (seconds, found), more in (
        ("from disk", (brain.seconds, brain.found), {"slowest_ms": slowest[:8].round(1).tolist()}),
        ("bare step", augmented, {}),
        ("bare step, no augmentation", plain, {}),
    ):
        yield {
            "what": what,
            **shared,
            **found,
            "ms": round(seconds / len(brain.kept) * 1e3, 2),
            "audio_s_per_s": round(audio / seconds, 1),
            "share": round(seconds / brain.seconds, 4),
            **more,
        }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_folder", help="a corpus in LibriSpeech's layout")
    source.add_argument("--synthetic", type=int, metavar="N", help="write N files of noise instead")
    parser.add_argument("--recipe", default="hparams/S2S/conmamba_large.yaml", metavar="YAML")
    parser.add_argument("--steps", type=count, default=50, help="timed")
    parser.add_argument(
        "--warm_up", type=int, default=10, help="steps before, besides two for every worker"
    )
    parser.add_argument("--limit", type=float, default=20, help="seconds the timed steps may take")
    parser.add_argument("--device", default=measure.best_device())
    return parser.parse_known_args()


def main():
    options, recipe_options = parse()
    table = measure.Table(
        {
            "what": "<26",
            "workers": ">7",
            "steps": ">5",
            "padding": ">7.3f",
            "recorded": ">8",
            "new": ">5",
            "ms": ">8.1f",
            "audio_s_per_s": ">13.0f",
            "share": ">6.3f",
        }
    )
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        rows = measure.attempt(lambda: list(run(options, recipe_options, folder)))
    for row in [{"what": "from disk", **rows}] if isinstance(rows, dict) else rows:
        table.add(row)
    measure.print_report("loading", options.device, table.rows, recipe=options.recipe)


if __name__ == "__main__":
    with plain_errors():
        main()
