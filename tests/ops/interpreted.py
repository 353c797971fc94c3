"""Kernels run on a CUDA device, elsewhere in Triton's interpreter, in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from modules.ops.causal_conv1d import triton
from tests.ops.interpreter import quicken

INTERPRETED = triton.interpreting()
if INTERPRETED:
    quicken()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
installed = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton comes for Linux alone"
)
outside = pytest.mark.skipif(INTERPRETED, reason="is what this test starts")
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="runs below test_in_the_interpreter"
)
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def run_in_the_interpreter(file, *options):
    """-> how many of the file's tests passed there; none failed"""
    command = [sys.executable, "-m", "pytest", *(options or ("-m", "not gpu")), file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
    return int(re.search(r"(\d+) passed", child.stdout).group(1))


def assert_near(got, expected, tolerance):
    """Relative to the largest number of each."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        if a.numel():
            assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 1e-3)


ROWS = {"u", "dt", "x", "y", "z", "out"}  # and their gradients: in the dtype of the model
NUMBERS = {"frames", "piece_frames", "tile", "utterances", "reverse_from", "states", "words"}
NUMBERS |= {"columns", "most", "blank"}  # of CTC
NUMBERS |= {"rows"}  # of partial sums


def compile_kernel(kernel, dtype, constants, warps, registers=None, **pointers):
    """-> registers a thread and bytes spilled, as ptxas reports them for sm_90, and the PTX

    registers: the launch's `maxnreg`; pointers: to what, where neither the dtype nor float32.
    """
    import triton as package
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    pointers = dict.fromkeys(ROWS | {f"d{x}" for x in ROWS}, dtype) | {"lengths": "i64"} | pointers
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        number = name in NUMBERS | {"channels"} or re.fullmatch(r"\w+_[bdgrt]", name)
        signature[name] = "i32" if number else f"*{pointers.get(name, 'fp32')}"
        if name not in NUMBERS:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "maxnreg": registers}
    ptx = package.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ptxas = package.knobs.nvidia.ptxas.path  # Triton's choice, for whose version it writes
        command = [ptxas, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        assert done.returncode == 0, report
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    return registers, int(re.search(r"(\d+) bytes spill stores", report).group(1)), ptx
