"""One whole training step of the S2S recipes: audio seconds a second, and peak memory.

    python benchmarks/training.py                                  # sizes L and S, all models
    python benchmarks/training.py --compile reduce-overhead       # as with train_S2S.py --compile
    python benchmarks/training.py --sizes large --models conmamba --profile profile.txt
    python benchmarks/training.py --device cpu --sizes tiny --batches 2x1 --steps 2

A step is train_S2S.py's own: waveforms on the device, features, frontend, encoder, decoder, both
losses, backward, clipping, optimizer. Augmentation is off and every batch is an optimizer step. A
batch is utterances x seconds, of noise. peak_gb is all that the allocator held, parameters and
optimizer included. warm_up_s is the first step with a batch's shape.

    conmamba, conmambamamba                  the shipped files
    conmamba2, conmamba-8x                   with Mamba-2 for a mixer, with subsampling by 8
    conformer-relpos, conformer-rope         the shipped Conformer, and with rotary attention
    speechbrain-relpos, speechbrain-rope     SpeechBrain's TransformerASR in their place

The last line is everything as JSON.
"""

import argparse
import sys
import tempfile
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
    make_batch,
    parameters,
    training_step,
)
from modules.command import count, plain_errors


def measure_step(brain, number, seconds, options):
    """-> {"audio_s_per_s", "ms", "peak_gb", "warm_up_s"}"""
    batch = make_batch(brain, number, seconds)

    def step():
        training_step(brain, batch)

    row = measure.time_calls(step, options.device, options.steps, limit=options.limit)
    peak = measure.peak_bytes(step, options.device)
    return {
        "audio_s_per_s": round(number * seconds / row["ms"] * 1e3, 1),
        **row,
        "peak_gb": measure.rounded(peak, 1e9, 2),
    }


def measure_model(model, size, options):
    """Yield a row a batch."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        brain = measure.attempt(
            build,
            *(model, size, folder, options.device, options.precision, options.compile),
            options.override,
        )
        for number, seconds in options.batches:
            row = {"model": model, "size": size, "batch": f"{number}x{seconds:g}"}
            if isinstance(brain, dict):  # why it could not be built
                yield row | brain
                continue
            row["parameters_m"] = round(parameters(brain), 1)
            yield row | measure.attempt(measure_step, brain, number, seconds, options)
            if options.profile:
                failed = measure.attempt(write_profile, brain, number, seconds, options)
                print(failed["error"] if failed else f"profile: {options.profile}")
                options.profile = None  # the first model's first batch is enough


def write_profile(brain, number, seconds, options, rows=40):
    """torch.profiler's table of a few steps, the costliest operators first."""
    from torch.profiler import ProfilerActivity, profile

    batch, steps = make_batch(brain, number, seconds), min(options.steps, 3)
    cuda = torch.device(options.device).type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=kinds) as profiler:
        for _ in range(steps):
            training_step(brain, batch)
        measure.synchronize(options.device)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    text = profiler.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=90)
    Path(options.profile).write_text(f"{steps} steps\n{text}\n", encoding="utf-8")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["large", "small"], choices=SIZES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--batches", nargs="+", type=batch_size, default=[(32, 16.0), (100, 5.0)], metavar="NxS"
    )
    parser.add_argument("--steps", type=count, default=8, help="timed, after four to warm up")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds a row's timed steps take")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default=measure.best_device())
    parser.add_argument("--compile", choices=COMPILE_MODES, help="not the SpeechBrain baselines")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipes' keys"
    )
    parser.add_argument("--profile", metavar="FILE", help="write a profile of the first row here")
    return parser.parse_args()


def main():
    options = parse()
    table = measure.Table(
        {
            "model": "<18",
            "size": "<5",
            "batch": "<6",
            "audio_s_per_s": ">13.0f",
            "ms": ">8.1f",
            "peak_gb": ">7.2f",
            "warm_up_s": ">9.1f",
        }
    )
    for size in options.sizes:
        for model in options.models:
            for row in measure_model(model, size, options):
                table.add(row)
            measure.release()
    measure.print_report(
        "training",
        options.device,
        table.rows,
        precision=options.precision,
        compile=options.compile,
        steps=options.steps,
        override=options.override,
    )


if __name__ == "__main__":
    with plain_errors():
        main()
