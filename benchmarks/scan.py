"""Time and peak memory of every selective-scan backend, forward and backward, at one shape.

    python benchmarks/scan.py --batch 4 --frames 400 --channels 512 --states 16 --device cpu
    python benchmarks/scan.py --check    # as `make bench`: fails when chunked is no longer worth it

"loop in C" is no backend: the same sums in one loop a channel, by the system's compiler, float32
on a CPU, as a bound. Prints a table and, as the last line, everything as JSON. Every backend runs
in a process of its own, so that none inherits another's memory.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import compiled_loop, measure
from modules.command import count, plain_errors
from modules.ops.selective_scan import available_backends, selective_scan

LOOP = "loop in C"
EXPORTED = ("scan", "doubling", "scripted")  # without gradients

# What `--check` asks of chunked against naive. The target is 5 times the speed; the guard is lower
# because machines that are shared give noisy times.
MIN_SPEEDUP = 3.0
MAX_MEMORY_RATIO = 0.25


def make_inputs(options):
    """Mamba's own ranges: dt after the softplus mostly in [0.001, 0.1], A = -1 .. -N."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, dtype=None):
        dtype = dtype or getattr(torch, options.dtype)
        x = torch.randn(*shape, generator=generator)
        return x.to(options.device, dtype).requires_grad_()

    batch, frames = options.batch, options.frames
    channels, states = options.channels, options.states
    A = -torch.arange(1.0, states + 1, device=options.device).repeat(channels, 1)
    return {
        "u": leaf(batch, frames, channels),
        "dt": leaf(batch, frames, channels),
        "A": A.requires_grad_(),
        "B": leaf(batch, frames, states),
        "C": leaf(batch, frames, states),
        "D": leaf(channels, dtype=torch.float32),
        "z": leaf(batch, frames, channels),
        "dt_bias": (leaf(channels, dtype=torch.float32).detach() - 4).requires_grad_(),
    }


def forward_backward(inputs, backend):
    if backend == LOOP:
        compiled_loop.forward_backward(inputs, torch.ones_like(inputs["u"]))
        return
    y = selective_scan(**inputs, dt_softplus=True, backend=backend)
    torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))


def resident_mb():
    """Resident memory now; on systems without /proc its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return peak_resident_mb()


def peak_resident_mb():
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_backend(options, backend):
    """-> milliseconds of every repeat, peak megabytes above the inputs; forward and backward."""
    torch.set_num_threads(options.threads)
    tiny = argparse.Namespace(**{**vars(options), "batch": 1, "frames": 2, "channels": 8})
    forward_backward(make_inputs(tiny), backend)  # loads libraries, starts threads
    inputs = make_inputs(options)
    cuda = options.device == "cuda"
    if cuda:
        forward_backward(inputs, backend)  # compiles and tunes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        # What the system gave this process, not what torch asked for: the peak so far may exceed
        # what is resident now, so the difference can only overstate the memory of the scan.
        before = resident_mb()
    forward_backward(inputs, backend)
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_resident_mb()

    times, clock = [], measure.CLOCKS[options.clock]
    for _ in range(options.repeats):
        start = clock()
        forward_backward(inputs, backend)
        if cuda:
            torch.cuda.synchronize()
        times.append((clock() - start) * 1e3)
    return {"times": times, "peak_mb": peak - before}


def run_all(options, arguments):
    names, backends = [], available_backends()
    if options.device == "cpu" and options.dtype == "float32":
        backends[LOOP] = compiled_loop.availability()
    for backend, reason in backends.items():
        if backend in EXPORTED:
            continue
        if reason == "ok" and (backend != "mamba_ssm" or options.device == "cuda"):
            names.append(backend)
        else:
            print(f"{backend:10s} skipped: {reason}")
    # In turns, so that a busy spell of the machine does not hit one backend alone.
    runs = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, *arguments, "--only", name]
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(child.stdout.splitlines()[-1]))

    results = {}
    for name in names:
        times = [t for run in runs[name] for t in run["times"]]
        results[name] = {
            "ms": round(statistics.median(times), 2),
            "least_ms": round(min(times), 2),
            "peak_mb": round(statistics.median(run["peak_mb"] for run in runs[name]), 1),
        }
    for name, result in results.items():
        result["speedup"] = round(results["naive"]["ms"] / result["ms"], 2)
        # A shape may be too small for the system to give a process more memory.
        result["memory_ratio"] = round(result["peak_mb"] / max(results["naive"]["peak_mb"], 0.1), 3)
        print(
            f"{name:10s} {result['ms']:8.1f} ms, least {result['least_ms']:8.1f} ms "
            f"{result['peak_mb']:8.1f} MB   "
            f"{result['speedup']:.2f} x the speed and {result['memory_ratio']:.3f} x the memory "
            "of naive"
        )
    return results


def check(results):
    """What is wrong with chunked's ratios to naive: a list of sentences, empty when nothing is."""
    chunked, wrong = results["chunked"], []
    if chunked["speedup"] < MIN_SPEEDUP:
        wrong.append(f"chunked has {chunked['speedup']} x the speed of naive, under {MIN_SPEEDUP}")
    if chunked["memory_ratio"] > MAX_MEMORY_RATIO:
        wrong.append(
            f"chunked has {chunked['memory_ratio']} x the memory of naive, over {MAX_MEMORY_RATIO}"
        )
    return wrong


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=count, default=4)
    parser.add_argument("--frames", type=count, default=400)
    parser.add_argument("--channels", type=count, default=512)
    parser.add_argument("--states", type=count, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=measure.CLOCKS, help=measure.CLOCK_HELP)
    parser.add_argument("--repeats", type=count, default=5, help="a round")
    parser.add_argument("--rounds", type=count, default=3, help="processes a backend, in turns")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with 1 unless chunked has {MIN_SPEEDUP} x the speed of naive and at most "
        f"{MAX_MEMORY_RATIO} x its memory",
    )
    parser.add_argument("--only", help="measure one backend in this process")
    return parser.parse_args(arguments)


def main():
    options = parse(sys.argv[1:])
    if options.only:
        print(json.dumps(measure_backend(options, options.only)))
        return
    results = run_all(options, sys.argv[1:])
    wrong = check(results) if options.check else []
    for sentence in wrong:
        print(f"error: {sentence}")
    rows = [{"backend": name, **result} for name, result in results.items()]
    left_out = ("device", "only", "check")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    measure.print_report("scan", options.device, rows, **settings)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    with plain_errors():
        main()
