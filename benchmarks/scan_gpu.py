"""Time and error of the selective scan's CUDA backends at the shapes of speech, on one device.

    python benchmarks/scan_gpu.py

One row a shape, dtype and backend: milliseconds forward, forward and backward (median of calls
that follow each other), peak memory above the inputs, and the largest error relative to the largest
number, of the result and of the worst gradient, against naive in float64 on a cut of the shape.
Prints a table and, as the last line, everything as JSON.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules.command import count, plain_errors
from modules.ops.selective_scan import available_backends, selective_scan

SHAPES = [(32, 1024, 400), (64, 288, 400), (1, 1024, 45000), (20, 288, 300)]  # B, D, T
# What every channel and state of a short cut can show, naive in float64 shows in seconds.
CUT = {"batch": 2, "frames": 203}


def make_inputs(batch, channels, frames, states, dtype, gate):
    """Mamba's own ranges: dt after the softplus mostly in [0.001, 0.1], A = -1 .. -N."""
    generator = torch.Generator("cuda").manual_seed(0)

    def leaf(*shape, dtype=dtype):
        x = torch.randn(*shape, generator=generator, device="cuda").to(dtype)
        return x.requires_grad_()

    A = -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1)
    inputs = {
        "u": leaf(batch, frames, channels),
        "dt": leaf(batch, frames, channels),
        "A": A.requires_grad_(),
        "B": leaf(batch, frames, states),
        "C": leaf(batch, frames, states),
        "D": leaf(channels, dtype=torch.float32),
        "dt_bias": (leaf(channels, dtype=torch.float32).detach() - 4).requires_grad_(),
    }
    return {**inputs, "z": leaf(batch, frames, channels)} if gate else inputs


def run(inputs, backend, dy):
    y = selective_scan(**inputs, dt_softplus=True, backend=backend)
    return y, torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))


def errors(shape, options, dtype, backend):
    """-> largest relative error of y, of the gradients"""
    _, channels, frames = shape
    frames = min(frames, CUT["frames"])
    inputs = make_inputs(CUT["batch"], channels, frames, options.states, dtype, options.gate)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    dy = torch.randn_like(inputs["u"])
    y, gradients = run(inputs, backend, dy)
    y_exact, exact_gradients = run(exact, "naive", dy)

    def error(got, expected):
        return ((got - expected).abs().max() / expected.abs().max()).item()

    return error(y, y_exact), max(map(error, gradients, exact_gradients))


def measure_backend(shape, options, dtype, backend):
    inputs = make_inputs(*shape, options.states, dtype, options.gate)
    dy = torch.randn_like(inputs["u"])

    def forward():
        with torch.no_grad():
            selective_scan(**inputs, dt_softplus=True, backend=backend)

    def forward_backward():
        run(inputs, backend, dy)

    def milliseconds(call):
        timed = measure.time_replays if options.graph else measure.time_calls
        return timed(call, "cuda", options.repeats, limit=options.limit)["ms"]

    result = {
        "forward_ms": milliseconds(forward),
        "forward_backward_ms": milliseconds(forward_backward),
        "peak_mb": measure.peak_bytes(forward_backward, "cuda", above=True) / 1e6,
    }
    result["error"], result["gradient_error"] = errors(shape, options, dtype, backend)
    return result


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=count, default=16)
    parser.add_argument("--gate", action="store_true", help="with z, as in Mamba; BiMamba has none")
    parser.add_argument("--repeats", type=count, default=50)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds a timing may take")
    parser.add_argument("--graph", action="store_true", help=measure.GRAPH_HELP)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    numbers = list(range(len(SHAPES)))
    parser.add_argument("--shapes", nargs="+", type=int, default=numbers, choices=numbers,
                        help="numbers of the shapes")  # fmt: skip
    parser.add_argument("--backends", nargs="+", default=["triton", "mamba_ssm", "chunked"])
    return parser.parse_args()


def main():
    options = parse()
    rows = []
    for shape in (SHAPES[i] for i in options.shapes):
        for dtype in (getattr(torch, name) for name in options.dtypes):
            for backend in options.backends:
                if available_backends()[backend] != "ok":
                    continue
                row = dict(zip(("batch", "channels", "frames"), shape, strict=True))
                row |= {"dtype": str(dtype).removeprefix("torch."), "backend": backend}
                row |= measure_backend(shape, options, dtype, backend)
                rows.append(row)
                print(
                    f"B {shape[0]:3d} D {shape[1]:5d} T {shape[2]:6d} {row['dtype']:8s} "
                    f"{backend:10s} forward {row['forward_ms']:8.3f} ms, with backward "
                    f"{row['forward_backward_ms']:8.3f} ms, {row['peak_mb']:7.0f} MB, "
                    f"error {row['error']:.1e}, of gradients {row['gradient_error']:.1e}",
                    flush=True,
                )
    measure.print_report("scan_gpu", "cuda", rows, **vars(options))


if __name__ == "__main__":
    with plain_errors():
        main()
