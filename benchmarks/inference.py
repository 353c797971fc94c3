"""Encoders: inference in batches, one hour in one pass, and a training step against length.

    python benchmarks/inference.py
    python benchmarks/inference.py --parts hour
    python benchmarks/inference.py --device cpu --sizes tiny --batch 2x1 --hour 4 --lengths 1 2

batch    waveforms to CTC logits without gradients, every model and size: features, frontend,
         encoder, CTC head. A batch is utterances x seconds, of noise.
hour     the same for ConMamba on one very long utterance, on one minute, and on as many minutes
         in one batch. ratio is the cost of a second of audio over that of the lone minute.
lengths  the encoder alone, forward and backward as in training, the frontend's output given, with
         the same audio in every batch, cut into longer and longer utterances.

hour and lengths are measured at the first of --sizes. peak_gb is all that the allocator held; in
lengths it is without the parameters. The last line is everything as JSON.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.models import (
    COMPILE_MODES,
    MODELS,
    SIZES,
    batch_size,
    build,
    encode,
    make_batch,
)
from modules.command import count, plain_errors

PARTS = {
    # What each part measures. The Mamba decoder's recipe has ConMamba's encoder.
    "batch": [model for model in MODELS if model != "conmambamamba"],
    "hour": ["conmamba"],
    "lengths": ["conmamba", "conformer-relpos", "conformer-rope"],
}
MINUTE = 60


def measure_inference(brain, number, seconds, options, warm_up=3):
    """-> {"audio_s_per_s", "ms", "peak_gb", "warm_up_s"}"""
    brain.modules.eval()
    batch = make_batch(brain, number, seconds)

    def infer():
        encode(brain, batch)

    times = measure.time_calls(infer, options.device, options.repeats, warm_up, options.limit)
    peak = measure.peak_bytes(infer, options.device)
    return {
        "audio_s_per_s": round(number * seconds / times["ms"] * 1e3, 1),
        **times,
        "peak_gb": measure.rounded(peak, 1e9, 2),
    }


def measure_encoder_step(brain, number, seconds, options):
    """Forward and backward of the encoder -> {"audio_s_per_s", "ms", "peak_gb"}"""
    brain.modules.train()
    hparams = brain.hparams
    frames = round(seconds * 1000 / hparams.hop_length) + 1
    frames = (frames + 3) // 4  # the frontend's two strides of two
    input_size = hparams.cnn_channels_2 * ((hparams.n_mels + 3) // 4)
    x = torch.randn(number, frames, input_size, device=brain.device, requires_grad=True)
    lengths = torch.full((number,), frames, device=brain.device)

    def forward():
        with brain.training_ctx:
            return brain.modules.encoder(x, lengths)[0]

    dy = torch.randn_like(forward())

    def step():
        forward().backward(dy)
        x.grad = None
        brain.zero_grad(set_to_none=True)

    step()
    peak = measure.peak_bytes(step, options.device, above=True)  # graphs keep memory of theirs
    # Beside tens of milliseconds one launch is nothing.
    timed = partial(measure.time_replays, calls=1) if options.graph else measure.time_calls
    ms = timed(step, options.device, options.repeats, 2, options.limit)["ms"]
    return {
        "audio_s_per_s": round(number * seconds / ms * 1e3, 1),
        "ms": ms,
        "peak_gb": measure.rounded(peak, 1e9, 2),
    }


def rows_of_batch(brain, options):
    number, seconds = options.batch
    row = measure.attempt(measure_inference, brain, number, seconds, options)
    yield {"batch": f"{number}x{seconds:g}", **row}


def rows_of_hour(brain, options):
    """A minute, as many minutes as the hour has side by side, and the hour."""
    minute = min(MINUTE, options.hour)
    minutes = round(options.hour / minute)
    lone = None
    for number, seconds in ((1, minute), (minutes, minute), (1, options.hour)):
        row = measure.attempt(measure_inference, brain, number, seconds, options, 1)
        if "ms" in row:
            cost = row["ms"] / (number * seconds)
            lone = lone or cost
            row["ratio"] = round(cost / lone, 3)
        yield {"batch": f"{number}x{seconds:g}", **row}


def rows_of_lengths(brain, options):
    for seconds in options.lengths:
        number = max(1, round(options.total / seconds))
        measure.free()  # the graph of the length before
        row = measure.attempt(measure_encoder_step, brain, number, seconds, options)
        yield {"batch": f"{number}x{seconds:g}", "seconds": seconds, **row}


def measure_model(model, size, parts, options):
    """Yield the rows of one model."""
    rows_of = {"batch": rows_of_batch, "hour": rows_of_hour, "lengths": rows_of_lengths}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        brain = measure.attempt(build, model, size, folder, options.device, options.precision,
                                options.compile)  # fmt: skip
        for part in parts:
            rows = [brain] if isinstance(brain, dict) else rows_of[part](brain, options)
            for row in rows:
                yield {"part": part, "model": model, "size": size, **row}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=["large", "small"], choices=SIZES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=batch_size, default=(32, 16.0), metavar="NxS")
    parser.add_argument("--hour", type=float, default=3600, help="seconds of the long utterance")
    parser.add_argument(
        "--lengths", nargs="+", type=float, default=[2, 4, 8, 16, 32, 64], help="seconds"
    )
    parser.add_argument(
        "--total", type=float, default=512, help="seconds of audio, of every length"
    )
    parser.add_argument("--repeats", type=count, default=10)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds a row's repeats may take")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default=measure.best_device())
    parser.add_argument("--compile", choices=COMPILE_MODES, help="not the SpeechBrain baselines")
    parser.add_argument("--graph", action="store_true", help=f"of lengths: {measure.GRAPH_HELP}")
    return parser.parse_args()


def main():
    options = parse()
    table = measure.Table(
        {
            "part": "<7",
            "model": "<18",
            "size": "<5",
            "batch": "<7",
            "audio_s_per_s": ">13.0f",
            "ms": ">9.2f",
            "peak_gb": ">7.2f",
            "ratio": ">6.3f",
            "warm_up_s": ">9.1f",
        }
    )
    for size in options.sizes:
        for model in options.models:
            parts = [part for part in options.parts if model in PARTS[part]]
            if size != options.sizes[0]:
                parts = [part for part in parts if part == "batch"]
            if not parts:
                continue
            for row in measure_model(model, size, parts, options):
                table.add(row)
            measure.release()
    measure.print_report(
        "inference",
        options.device,
        table.rows,
        precision=options.precision,
        compile=options.compile,
        graph=options.graph,
    )


if __name__ == "__main__":
    with plain_errors():
        main()
