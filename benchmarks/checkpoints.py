"""What checkpoints cost a training: the seconds and the megabytes of one, written and read.

    python benchmarks/checkpoints.py hparams/CTC/conmamba_small.yaml hparams/S2S/conmamba_large.yaml

Weights, AdamW's two moments, schedule and the rest, as a run saves them: digests, fsync and rename
included. A training waits for all of it, so its share of the time is seconds over the interval.
The last line is everything as JSON.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import print_report
from modules import digests
from modules.command import count, plain_errors
from modules.optimizers import parameter_groups


def parts(path, folder):
    """A run's checkpointer, with an optimizer that has taken a step."""
    with open(path, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, {"output_folder": str(folder)})
    model = hparams["model"]
    optimizer = hparams["opt_class"](parameter_groups(model, 0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    hparams["checkpointer"].add_recoverable("optimizer", optimizer)
    return hparams["checkpointer"]


def measure(path, repeats):
    """Least seconds to write one, and to check and read it; its size in MB."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpointer, written, read = parts(path, folder), [], []
        checkpointer.allow_partial_load = True
        for _ in range(repeats):
            started = time.perf_counter()
            checkpointer.save_and_keep_only(num_to_keep=1, verbosity=logging.DEBUG)
            written.append(time.perf_counter() - started)
        found = checkpointer.find_checkpoint()
        for _ in range(repeats):
            # What was checked is remembered, but not by a new process.
            digests._damage.cache_clear()
            started = time.perf_counter()
            checkpointer.recover_if_possible()
            read.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in found.path.iterdir())
        return min(written), min(read), size / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument(
        "--minutes", type=float, default=30, help="interval (ckpt_interval_minutes)"
    )
    options = parser.parse_args()
    rows = []
    for path in options.files:
        written, read, size = measure(path, options.repeats)
        share = 100 * written / (60 * options.minutes)
        rows.append({"file": str(path), "MB": size, "write_s": written, "read_s": read})
        rows[-1]["percent_of_time"] = share
        print(
            f"{path}: {size:.1f} MB, written in {written:.3f} s, read in {read:.3f} s: "
            f"{share:.3f} % of training, saved every {options.minutes:g} min"
        )
    print_report("checkpoints", "cpu", rows)


if __name__ == "__main__":
    with plain_errors():
        main()
