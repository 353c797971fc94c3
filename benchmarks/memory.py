"""What holds the memory at the most of a training step: tensors by the line that made them.

    python benchmarks/memory.py --size large --compile reduce-overhead
    python benchmarks/memory.py --override gradient_checkpointing=True --compile reduce-overhead

The first steps of a model of training.py are recorded by PyTorch's allocator
(https://docs.pytorch.org/docs/stable/torch_cuda_memory.html), their warm-up included; with CUDA
graphs what the graphs hold counts alone, which is what stays. A line of the table is all tensors of
one size that were made at one place; of compiled code it is the line of that code, and the modules'
behind it. Needs a CUDA device. The last line is everything as JSON.
"""

import argparse
import linecache
import sys
import tempfile
from collections import Counter
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
    training_step,
)
from modules.command import count, plain_errors


def at_most(events, within=lambda address: True):
    """The allocator's events, in order -> bytes at the most, and what was there then.

    within: tells the addresses that count. What was there: [(bytes, stack frames), ...].
    """
    alive, total, most, then = {}, 0, 0, []
    grows = False
    for event in events:
        address = event["addr"]
        if event["action"] == "alloc" and within(address):
            alive[address] = event["size"], event["frames"]
            total += event["size"]
            grows = total > most
            most = max(most, total)
        elif event["action"] == "free_completed" and address in alive:
            if grows:
                then, grows = list(alive.values()), False
            total -= alive.pop(address)[0]
    return most, list(alive.values()) if grows else then


def place(frames, depth=3):
    """The innermost lines of compiled code and of this project in a stack, as text."""
    lines = []
    for frame in frames:
        path, line = frame["filename"], frame["line"]
        if "torchinductor" in path:
            text = linecache.getline(path, line).strip()
            if "empty_strided" in text:
                lines.append(text)
        elif "site-packages" not in path and path.startswith(f"{measure.ROOT}/"):
            lines.append(f"{Path(path).name}:{line}:{frame['name']}")
        if len(lines) == depth:
            break
    if not lines and frames:
        lines = [f"{Path(frames[0]['filename']).name}:{frames[0]['line']}"]
    return " < ".join(lines)


def rows_of(tensors):
    """[(bytes, stack frames), ...] -> rows, the most bytes first."""
    found = Counter((place(frames), size) for size, frames in tensors)
    rows = [
        {"mb": round(size * number / 1e6, 1), "number": number, "place": where}
        for (where, size), number in found.items()
    ]
    return sorted(rows, key=lambda row: -row["mb"])


def of_graphs(segments):
    """A function that tells whether an address is in the memory of CUDA graphs; any if none is."""
    pools = [s for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0)]
    ranges = [range(s["address"], s["address"] + s["total_size"]) for s in pools]
    return (lambda address: any(address in r for r in ranges)) if ranges else lambda address: True


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="large", choices=SIZES)
    parser.add_argument("--model", default="conmamba", choices=list(MODELS))
    parser.add_argument("--batch", type=batch_size, default=(32, 16.0), metavar="NxS")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--compile", choices=COMPILE_MODES)
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", type=count, default=60, help="of the table, at most")
    return parser.parse_args()


def main():
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device, whose memory this measures")
    torch.cuda.memory._record_memory_history(max_entries=10**7, context="alloc", stacks="python")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = options.model, options.size, folder, "cuda", options.precision, options.compile
        brain = build(*model, options.override)
        batch = make_batch(brain, *options.batch)
        for _ in range(3):  # the third by graphs, if there are any
            training_step(brain, batch)
        torch.cuda.synchronize()
        found = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        peak = measure.peak_bytes(lambda: training_step(brain, batch), "cuda")
    events = found["device_traces"][torch.cuda.current_device()]
    most, tensors = at_most(events, of_graphs(found["segments"]))
    print(f"peak of a step {peak / 1e9:.2f} GB, of which below {most / 1e9:.2f} GB")
    table = measure.Table({"mb": ">9.1f", "number": ">6", "place": "<20"})
    for row in rows_of(tensors)[: options.rows]:
        table.add(row)
    measure.print_report("memory", "cuda", table.rows, peak_gb=round(peak / 1e9, 2))


if __name__ == "__main__":
    with plain_errors():
        main()
