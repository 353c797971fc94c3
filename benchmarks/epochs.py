"""Epochs of a small corpus through the loader alone: what living workers and kept audio save.

    python benchmarks/epochs.py --data_folder /data/digits --train_splits "[train-clean-100]" \
        --dev_splits "[dev-clean]" --num_workers 2 --max_batch_length_train 100 --num_buckets 10

An epoch is all training and all validation batches, as the recipe's options make them, for a model
that takes no time: where the model is slower, nothing of this shows. The ways take turns, epoch by
epoch. Files come from the page cache. first_ms is the time to the first training batch; share is
the epoch's time over that of workers that are started anew and files that are decoded anew.
Other options are given to the recipe. The last line is everything as JSON.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from speechbrain.dataio.dataloader import SaveableDataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules import launch
from modules.command import count, plain_errors
from modules.data import (
    eval_loader_options,
    hours,
    keep_audio,
    prepare_manifests,
    train_loader_options,
)
from modules.workers import end_workers
from train_CTC import dataio_prepare


class Way:
    """One way to load: its loaders, and what its epochs took."""

    def __init__(self, hparams, living, kept):
        train, valid, _ = dataio_prepare(hparams)
        if kept:
            started = time.perf_counter()
            keep_audio(train, valid)
            self.decoding = time.perf_counter() - started
            if not train.audio_files.kept:
                raise SystemExit("error: the audio does not fit; raise --audio_cache_mb")
        self.hours = hours(train), hours(valid)
        seconds = hparams["max_batch_length_val"]
        options = train_loader_options(hparams, train), eval_loader_options(hparams, valid, seconds)
        workers = {"persistent_workers": living and hparams["num_workers"] > 0}
        self.loaders = [
            SaveableDataLoader(dataset, **{**o, **workers})
            for dataset, o in zip((train, valid), options, strict=True)
        ]
        self.seconds, self.first = [], []
        self.row = {
            "workers": "live on" if living else "anew",
            "audio": "memory" if kept else "disk",
        }

    def epoch(self, number):
        started = time.perf_counter()
        train, _ = self.loaders
        train.dataset.set_epoch(number)
        train.batch_sampler.set_epoch(number)
        for i, loader in enumerate(self.loaders):
            for j, _ in enumerate(loader):
                if i == j == 0:
                    self.first.append(time.perf_counter() - started)
        self.seconds.append(time.perf_counter() - started)

    def result(self, baseline):
        """The table's row; the first epoch warms up."""
        seconds, first = (statistics.median(x[1:]) for x in (self.seconds, self.first))
        share = seconds / statistics.median(baseline.seconds[1:])
        return self.row | {
            "epoch_s": round(seconds, 4),
            "first_ms": round(first * 1e3, 1),
            "share": round(share, 4),
        }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="hparams/CTC/conmamba_small.yaml", metavar="YAML")
    parser.add_argument("--epochs", type=count, default=10, metavar="N", help="timed, of each way")
    return parser.parse_known_args()


def main():
    options, recipe_options = parse()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        words = [f"--output_folder={folder}", "--device=cpu", *recipe_options]
        _, hparams, *_ = launch.start([options.recipe, *words])
        os.makedirs(folder, exist_ok=True)
        prepare_manifests(hparams)
        ways = [Way(hparams, *way) for way in ((0, 0), (1, 0), (0, 1), (1, 1))]
        for epoch in range(1, options.epochs + 2):
            for way in ways:
                way.epoch(epoch)
        for loader in (loader for way in ways for loader in way.loaders):
            end_workers(loader)
    table = measure.Table(
        {"workers": "<8", "audio": "<7", "epoch_s": ">8.3f", "first_ms": ">8.1f", "share": ">6.3f"}
    )
    for way in ways:
        table.add(way.result(ways[0]))
    measure.print_report(
        "epochs",
        "cpu",
        table.rows,
        num_workers=hparams["num_workers"],
        minutes=[round(60 * h, 1) for h in ways[0].hours],
        decoding_s=round(ways[-1].decoding, 2),
    )


if __name__ == "__main__":
    with plain_errors():
        main()
