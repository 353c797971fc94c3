"""The S2S recipes on a CPU: real-time factor of recognition, seconds of training an audio minute.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --sizes tiny --models conmamba --threads 1 --rounds 5

recognise_rtf   seconds of work a second of audio: features, frontend, encoder, CTC head and greedy
                search, on one utterance of --utterance seconds of noise.
train_s         seconds of a whole training step (both losses, backward, optimizer) a minute of
                audio, on a batch of --batch utterances x seconds.

conmamba runs with the portable scan (chunked) and with the loop in Python (naive); conmamba2 has
Mamba-2, conmamba-8x frames of 80 ms. All are measured in turn, --rounds times, and the least
counts, as other programs may keep the machine busy. A ratio is the time over that of the first
row of a size: below 1 is faster. The last line is everything as JSON.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.models import SIZES, batch_size, build, encode, make_batch, training_step
from modules.command import count, plain_errors
from modules.ops import selective_scan
from modules.search import ctc_greedy

ROWS = {
    "conmamba": ["chunked", "naive"],
    "conmamba2": ["chunked"],
    "conmamba-8x": ["chunked"],
    "conformer-relpos": [None],
}


def seconds(call, clock):
    started = clock()
    call()
    return clock() - started


def measure_row(brain, backend, options):
    """-> {"recognise_rtf", "train_s"}; the first call of a brain warms it up."""
    selective_scan.set_backend(backend or "auto")
    (number, each), utterance = options.batch, options.utterance
    one, many = make_batch(brain, 1, utterance), make_batch(brain, number, each)

    def recognise():
        logits = encode(brain, one)
        ctc_greedy(logits.log_softmax(-1), torch.tensor([logits.shape[1]]))

    brain.modules.eval()
    clock = measure.CLOCKS[options.clock]
    recognition = seconds(recognise, clock)
    brain.modules.train()
    training = seconds(lambda: training_step(brain, many), clock)
    return {"recognise_rtf": recognition / utterance, "train_s": training * 60 / (number * each)}


def rows_of(size, options):
    """Yield the rows of one size."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        calls = {}
        for model in options.models:
            brain = build(model, size, folder, "cpu", "fp32")
            for backend in ROWS[model]:
                calls[model, backend] = partial(measure_row, brain, backend, options)
        first = None
        for (model, backend), row in measure.in_turn(calls, options.rounds):
            first = first or row
            for name in ("recognise_rtf", "train_s"):
                if name in row:
                    row[f"{name}_ratio"] = row[name] / first[name]
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            yield {"model": model, "scan": backend, "size": size, **row}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--models", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--utterance", type=float, default=16.0, metavar="SECONDS")
    parser.add_argument("--batch", type=batch_size, default=(4, 8.0), metavar="NxS")
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--clock", default="wall", choices=measure.CLOCKS, help=measure.CLOCK_HELP)
    parser.add_argument("--rounds", type=count, default=4, help="the first also warms up")
    return parser.parse_args()


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    table = measure.Table(
        {
            "model": "<17",
            "scan": "<8",
            "size": "<5",
            "recognise_rtf": ">7.4f",
            "recognise_rtf_ratio": ">7.2f",
            "train_s": ">7.2f",
            "train_s_ratio": ">7.2f",
        }
    )
    for size in options.sizes:
        for row in rows_of(size, options):
            table.add(row)
    settings = {k: v for k, v in vars(options).items() if k not in ("sizes", "models")}
    measure.print_report("cpu", "cpu", table.rows, **settings)


if __name__ == "__main__":
    with plain_errors():
        main()
