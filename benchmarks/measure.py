"""What every benchmark shares: time, peak memory, a table, and the JSON line that names the run."""

import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


# ---- The run ----


def commit():
    """Short hash, with "+" when tracked files differ; $GIT_COMMIT where there is no repository."""

    def git(*command):
        result = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    named = git("rev-parse", "--short", "HEAD")
    return os.environ.get("GIT_COMMIT") or (named + changed if named else "unknown")


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device):
    """The name its maker gave it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def print_report(benchmark, device, rows, **more):
    """The last line of a benchmark: all that was printed, for machines.

    Keys of `more` whose values JSON does not know are written as text.
    """
    report = {
        "benchmark": benchmark,
        "commit": commit(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        **more,
        "rows": rows,
    }
    print(json.dumps(report, default=str), flush=True)


# ---- Time and memory ----

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK_HELP = (
    "cpu: the processor's time that the benchmark itself took, for a machine that is busy with "
    "other programs; with one thread alone it stands for the wall's"
)


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def time_calls(call, device, repeats=20, warm_up=3, limit=6.0, clock="wall"):
    """Median milliseconds of a call, and the seconds of the first: {"ms", "warm_up_s"}.

    The calls follow each other as in a run, without waiting for the device in between, so that
    launches hide behind work where they can. No more calls than fit into `limit` seconds, but
    three.
    """
    started = time.perf_counter()
    call()  # compiles, tunes, fills the allocator
    synchronize(device)
    first = time.perf_counter() - started
    for _ in range(warm_up - 1):
        call()
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    fitting = int(limit / (time.perf_counter() - started))
    times = intervals(call, device, max(3, min(repeats, fitting)), CLOCKS[clock])
    return {"ms": round(statistics.median(times), 4), "warm_up_s": round(first, 2)}


def intervals(call, device, repeats, clock=time.perf_counter):
    """Milliseconds from one call's end to the next one's, on the device's own clock."""
    if torch.device(device).type != "cuda":
        marks = [clock()]
        for _ in range(repeats):
            call()
            marks.append(clock())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


GRAPH_HELP = (
    "time replays of a CUDA graph of the calls: what the kernels take, without their launches, as "
    "in training with --compile_mode reduce-overhead"
)


RECORDED = 10  # calls a graph: what it takes to launch one is no part of them


def time_replays(call, device, *arguments, calls=RECORDED, **options):
    """As `time_calls`, of the call's kernels alone: some of them, replayed as a CUDA graph."""
    row = time_calls(replayed(call, calls), device, *arguments, **options)
    return {**row, "ms": round(row["ms"] / calls, 4)}


def replayed(call, calls=1):
    """So many calls recorded as a CUDA graph -> a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills the allocator
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def peak_bytes(call, device, above=False):
    """The most that the allocator held during a call; None without CUDA.

    above: without what it held before, such as the parameters of a layer and its input.
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if above else 0
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + graph_bytes()


def graph_bytes():
    """What CUDA graphs keep for themselves between their passes, which counts as not allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0))


def rounded(number, unit, digits):
    """number / unit, rounded; None stays None."""
    return None if number is None else round(number / unit, digits)


def release():
    """Give back what the last model held, so that the next one is measured alone."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled code keeps its constants
    free()


def free():
    """Give back what nothing holds any more, CUDA graphs with it."""
    gc.collect()
    if torch.cuda.is_available():
        attempt(torch.cuda.empty_cache)  # after a kernel has failed, this fails too


def attempt(function, *arguments):
    """function's row; of one that fails the reason: a baseline must not stop the others."""
    try:
        return function(*arguments)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        return {"error": f"{type(error).__name__}: {reason}"[:200]}


def in_turn(calls, rounds):
    """Yield (name, row) of {name: function that gives a row}, of each number the least.

    Every round measures all, so that a busy spell of the machine does not hit one alone.
    """
    least = {}
    for number in range(1, rounds + 1):
        for name, call in calls.items():
            row, before = attempt(call), least.get(name, {})
            least[name] = {
                key: min(value, before[key]) if isinstance(before.get(key), float) else value
                for key, value in row.items()
            }
            release()
            if number == rounds:
                yield name, least[name]


# ---- The table ----


class Table:
    """Prints rows (dicts) as they come, under a heading.

    columns: {key: format}, such as {"model": "<20", "ms": ">9.2f"}. A row with the key "error"
    shows its reason in place of what it lacks; a lacking value is a dash.
    """

    def __init__(self, columns):
        self.columns = columns
        print("  ".join(f"{name:{self.shape(name)}}" for name in columns), flush=True)
        self.rows = []

    def shape(self, name):
        """Alignment and width alone, wide enough for the name."""
        fmt = self.columns[name]
        return f"{fmt[0]}{max(int(fmt[1:].split('.')[0]), len(name))}"

    def add(self, row):
        self.rows.append(row)
        cells = []
        for name, fmt in self.columns.items():
            value = row.get(name)
            if value is None and "error" in row:
                cells.append(row["error"])
                break
            decimals = "." + fmt.split(".")[1] if "." in fmt and value is not None else ""
            text = "-" if value is None else f"{value:{decimals}}"
            cells.append(f"{text:{self.shape(name)}}")
        print("  ".join(cells), flush=True)
