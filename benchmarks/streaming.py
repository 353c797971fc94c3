"""Streaming: compute of every chunk, real-time factor, and memory over hours.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --hours 1 --threads 1
    python benchmarks/streaming.py --model chunked
    python benchmarks/streaming.py --size tiny --chunks 0.16 0.32 0.64

A causal or chunked ConMamba of hparams/CTC with random weights hears noise, from samples to words,
as stream.py does. A row is a number of threads and a chunk. share is p99 over the chunk, which must
stay under 1 to keep up; rtf is compute over audio. cpu is the processor's time, of all threads,
which a busy machine prolongs less than the clock's. rss_mb is the process's memory after a tenth of
the stream, growth_mb what came to it until the end. The last line is everything as JSON.
"""

import argparse
import os
import sys
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from inference import Recognizer, StreamingRecognizer
from modules.command import count, plain_errors

ROOT = Path(__file__).resolve().parent.parent
PACKET = 0.02  # s


def build(model, size, device):
    """A shipped model with random weights, as a package would hold it."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        path = ROOT / f"hparams/CTC/conmamba_{model}_{size}.yaml"
        hparams = load_hyperpyyaml(path.read_text(), {"output_folder": folder})
    names = ("normalize", "frontend", "encoder", "ctc_head", "tokenizer")
    parts = {"features": hparams["compute_features"], "search": None}
    parts |= {name: hparams[name] for name in names}
    x, _ = parts["features"](torch.from_numpy(noise(0, 16000))[None], torch.tensor([16000]))
    parts["normalize"].glob_mean, parts["normalize"].glob_std = x[0].mean(0), x[0].std(0)
    return Recognizer(parts, hparams["sample_rate"], device)


def noise(seed, samples):
    return 0.1 * np.random.default_rng(seed).standard_normal(samples, dtype=np.float32)


def resident():
    """Megabytes of memory that this process holds; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_stream(recognizer, chunk_seconds, seconds):
    """Push `seconds` of noise -> a row."""
    stream = StreamingRecognizer(recognizer, chunk_seconds, history=False)
    rate, chunks, cpu, total = stream.sample_rate, array("d"), array("d"), 0.0
    packet = int(PACKET * rate)
    minute = noise(1, 60 * rate)
    before = None
    for i in range(int(seconds / PACKET)):
        if before is None and i * PACKET >= seconds / 10:
            before = resident()
        start = i * packet % (len(minute) - packet)
        done, cpu_started, started = stream.chunks, time.process_time(), time.perf_counter()
        stream.push(minute[start : start + packet])
        spent = time.perf_counter() - started
        total += spent
        if stream.chunks > done:
            chunks.append(spent)
            cpu.append(time.process_time() - cpu_started)
    after = resident()
    points = torch.tensor([0.5, 0.95, 0.99, 1.0])
    p50, p95, p99, most = (torch.tensor(chunks).quantile(points) * 1000).tolist()
    cpu_p50, _, cpu_p99, _ = (torch.tensor(cpu).quantile(points) * 1000).tolist()
    return {
        "chunk_ms": stream.chunk_seconds * 1000,
        "chunks": len(chunks),
        "p50_ms": round(p50, 2),
        "p95_ms": round(p95, 2),
        "p99_ms": round(p99, 2),
        "longest_ms": round(most, 2),
        "cpu_p50_ms": round(cpu_p50, 2),
        "cpu_p99_ms": round(cpu_p99, 2),
        "share": round(p99 / 1000 / stream.chunk_seconds, 4),
        "rtf": round(total / seconds, 4),
        "rss_mb": None if after is None else round(before, 1),
        "growth_mb": None if after is None else round(after - before, 2),
    }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="causal", choices=["causal", "chunked"])
    parser.add_argument("--size", default="small", choices=["small", "tiny"])
    parser.add_argument("--hours", type=float, default=0.05, help="of audio, a row")
    parser.add_argument("--threads", nargs="+", type=count, default=[1, 2])
    parser.add_argument("--chunks", nargs="+", type=float, default=[0.32], help="seconds")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main():
    options = parse()
    columns = {"threads": "<7", "chunk_ms": ">8.0f", "chunks": ">6"}
    times = ("p50_ms", "p95_ms", "p99_ms", "longest_ms", "cpu_p50_ms", "cpu_p99_ms")
    columns |= {k: ">10.1f" for k in times}
    columns |= {"share": ">6.3f", "rtf": ">6.3f", "rss_mb": ">7.1f", "growth_mb": ">9.2f"}
    table = measure.Table(columns)
    recognizer = build(options.model, options.size, options.device)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for chunk in options.chunks:
            row = measure.attempt(measure_stream, recognizer, chunk, options.hours * 3600)
            table.add({"threads": threads, **row})
    measure.print_report(
        "streaming",
        options.device,
        table.rows,
        model=options.model,
        size=options.size,
        hours=options.hours,
        load=os.getloadavg(),
    )


if __name__ == "__main__":
    with plain_errors():
        main()
