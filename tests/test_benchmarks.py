"""Every benchmark runs on the CPU at tiny sizes, and ends with a JSON line that tells all rows."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compiled_loop, measure, memory, scan
from benchmarks.models import build, make_batch, training_step
from modules.ops.selective_scan import selective_scan
from tests.recipes import runs

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(script, *arguments, **variables):
    """What a command prints, and its exit status."""
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    environment = ENVIRONMENT | variables
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines(), done.returncode


def report_of(printed, benchmark):
    report = json.loads(printed[-1])
    assert report["benchmark"] == benchmark
    assert {"commit", "device", "torch", "rows"} <= report.keys()
    assert not [row for row in report["rows"] if "error" in row]
    return report


def test_mixers():
    names = ["BiMamba", "Mamba", "BiMamba2", "Mamba2", "RelPos", "RoPE", "speechbrain-relpos",
             "speechbrain-rope", "flash-attention"]  # fmt: skip
    printed, _ = run("mixers.py", "--device=cpu", "--d_model=32", "--num_heads=4",
                     "--shapes", "2x20", "1x30", "--repeats=1", "--limit=0.1",
                     "--rounds=2")  # fmt: skip
    rows = report_of(printed, "mixers")["rows"]
    assert [row["mixer"] for row in rows] == 2 * names
    assert all(row["forward_ms"] > 0 and row["forward_backward_ms"] > 0 for row in rows)
    assert len(printed) == 2 + len(rows) and rows[0]["ratio"] == 1


def test_machine_code():
    pytest.importorskip("triton")
    printed, status = run("machine_code.py", "--calls=conv")
    rows = report_of(printed, "machine_code")["rows"]
    assert status == 0 and len(printed) == 1 + len(rows)
    kernels = {"forward_kernel", "backward_kernel", "sum_kernel"}
    assert {row["kernel"].split()[1] for row in rows} == kernels
    for row in rows:
        one, two, four = row["cycles"]
        # A cycle takes one instruction of one warp, and more warps take no less time.
        assert row["instructions"] <= one <= two <= four
        assert 4 * row["instructions"] <= four


def test_the_scan_waits_for_no_load():
    """Nothing in its forward's loops does, though memory be slow: see docs/kernels.md."""
    pytest.importorskip("triton")
    cycles = []
    for latency in (30, 600):
        printed, _ = run("machine_code.py", "--calls=forwards", f"--latency={latency}")
        cycles.append([row["cycles"] for row in report_of(printed, "machine_code")["rows"]])
    assert len(cycles[0]) == 8 and cycles[0] == cycles[1]


def test_what_a_loop_waits_for():
    """A result's latency is hidden by other warps; a unit's rate by nothing."""
    machine_code = pytest.importorskip("benchmarks.machine_code")

    def instruction(name, waits=(), result=7):
        return machine_code.Instruction(name, name, 1, list(waits), result, 7)

    waiting = [instruction("SHFL", result=0), instruction("FADD", waits=[0])]
    assert [machine_code.issue(waiting, warps)[0] for warps in (1, 4)] == [25, 25]
    rate = [instruction("MUFU"), instruction("FADD")]
    assert [machine_code.issue(rate, warps)[0] for warps in (1, 4)] == [8, 32]


def test_feed_forward():
    pytest.importorskip("triton")
    printed, _ = run("feed_forward.py", "--device=cpu", "--d_model=48", "--d_ffn=64",
                     "--batches", "2x9", "--repeats=1", "--limit=0.1",
                     TRITON_INTERPRET="1")  # fmt: skip
    rows = report_of(printed, "feed_forward")["rows"]
    assert [(row["closes"], row["by"]) for row in rows] == [
        (False, "pytorch"), (False, "kernel"), (True, "pytorch"), (True, "kernel"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["off"] < 0.02 for row in rows)


def test_training(tmp_path):
    models = ["conmamba", "conmamba-8x", "conformer-rope", "speechbrain-relpos"]
    printed, _ = run("training.py", "--device=cpu", "--sizes=tiny", "--batches", "2x1",
                     "--models", *models, "--steps=1", "--limit=0.1",
                     "--override", "gradient_checkpointing=True",
                     "--profile", tmp_path / "profile.txt")  # fmt: skip
    rows = report_of(printed, "training")["rows"]
    assert [row["model"] for row in rows] == models
    assert all(row["batch"] == "2x1" and row["audio_s_per_s"] > 0 for row in rows)
    assert "aten::" in (tmp_path / "profile.txt").read_text()


def test_what_cannot_be_compiled_is_a_row_with_the_reason():
    printed, _ = run("training.py", "--device=cpu", "--sizes=tiny", "--batches", "2x1",
                     "--models", "conmamba", "--compile=default")  # fmt: skip
    (row,) = json.loads(printed[-1])["rows"]
    assert "--compile needs a CUDA device" in row["error"]


def test_inference():
    printed, _ = run("inference.py", "--device=cpu", "--sizes=tiny", "--batch=2x1", "--hour=3",
                     "--lengths", "1", "2", "--total=2", "--repeats=1", "--limit=0.1",
                     "--models", "conmamba", "conmambamamba", "conformer-relpos")  # fmt: skip
    rows = report_of(printed, "inference")["rows"]
    assert [(row["part"], row["batch"]) for row in rows] == [
        ("batch", "2x1"), ("hour", "1x3"), ("hour", "1x3"), ("hour", "1x3"),
        ("lengths", "2x1"), ("lengths", "1x2"),
        ("batch", "2x1"), ("lengths", "2x1"), ("lengths", "1x2"),
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_loading(workers):
    printed, _ = run("loading.py", "--device=cpu", "--synthetic=2", "--steps=1", "--warm_up=1",
                     "--recipe=hparams/S2S/conmamba_tiny.yaml", f"--num_workers={workers}",
                     "--max_batch_length_train=16")  # fmt: skip
    rows = report_of(printed, "loading")["rows"]
    assert [row["what"] for row in rows] == [
        "from disk", "bare step", "bare step, no augmentation",
    ]  # fmt: skip
    assert rows[0]["share"] == 1 and all(row["steps"] == 1 for row in rows)


def test_cpu():
    printed, _ = run("cpu.py", "--sizes=tiny", "--models", "conmamba", "conmamba2",
                     "--utterance=1", "--batch=1x1", "--rounds=1", "--threads=1")  # fmt: skip
    rows = report_of(printed, "cpu")["rows"]
    assert [(row["model"], row["scan"]) for row in rows] == [
        ("conmamba", "chunked"), ("conmamba", "naive"), ("conmamba2", "chunked"),
    ]  # fmt: skip
    assert all(row["recognise_rtf"] > 0 and row["train_s_ratio"] > 0 for row in rows)


def test_of_rounds_the_least_number_counts():
    times, calls = iter([3.0, 9.0, 5.0, 7.0]), []

    def call(name):
        calls.append(name)
        return {"ms": next(times), "model": name}

    rows = measure.in_turn({name: partial(call, name) for name in "ab"}, rounds=2)
    assert list(rows) == [("a", {"ms": 3.0, "model": "a"}), ("b", {"ms": 7.0, "model": "b"})]
    assert calls == ["a", "b", "a", "b"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_loop_in_c_is_the_scan():
    assert compiled_loop.availability() == "ok"
    inputs = scan.make_inputs(SimpleNamespace(batch=2, frames=23, channels=5, states=3,
                                              device="cpu", dtype="float32"))  # fmt: skip
    dy = torch.randn(2, 23, 5)
    y = selective_scan(**inputs, dt_softplus=True, backend="naive")
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    found, ours = compiled_loop.forward_backward(inputs, dy)
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
    for expected, (name, gradient) in zip(gradients, ours.items(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_without_a_compiler_the_loop_tells_why(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiled_loop.availability() == "needs a C compiler, and there is no cc on the PATH"


def test_epochs():
    printed, _ = run("epochs.py", f"--data_folder={runs.corpus()}", "--train_splits=[train]",
                     "--dev_splits=[dev]", "--test_splits=[dev]", "--num_workers=1", "--epochs=1",
                     "--recipe=hparams/CTC/conmamba_tiny.yaml")  # fmt: skip
    rows = report_of(printed, "epochs")["rows"]
    assert [(row["workers"], row["audio"]) for row in rows] == [
        ("anew", "disk"), ("live on", "disk"), ("anew", "memory"), ("live on", "memory"),
    ]  # fmt: skip
    assert rows[0]["share"] == 1 and all(row["first_ms"] > 0 for row in rows)


def test_scan_check_fails_by_its_exit_status():
    """At so small a shape chunked saves no memory, or no time."""
    printed, status = run("scan.py", "--check", "--batch=1", "--frames=4", "--channels=8",
                          "--states=2", "--rounds=1", "--repeats=1", "--threads=1")  # fmt: skip
    rows = report_of(printed, "scan")["rows"]
    assert {row["backend"] for row in rows} >= {"chunked", "naive"}
    assert status == any(line.startswith("error: chunked") for line in printed)


def test_a_failed_row_tells_why(capsys):
    def fail(text):
        raise ValueError(f"{text}\nmore")

    row = measure.attempt(fail, "no such layer")
    table = measure.Table({"name": "<8", "ms": ">9.2f", "gb": ">5.1f"})
    table.add({"name": "one", "ms": 1.234})
    table.add({"name": "two", **row})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["one", "1.23", "-"]
    assert lines[2].split(maxsplit=1) == ["two", "ValueError: no such layer"]


def test_memory_at_the_most():
    def event(action, address, size=0, line=0):
        frames = [
            {"filename": "/opt/site-packages/torch/nn.py", "line": 1, "name": "forward"},
            {"filename": f"{ROOT}/modules/encoder.py", "line": line, "name": "forward"},
        ]
        return {"action": action, "addr": address, "size": size, "frames": frames}

    events = [
        event("alloc", 1, 5_000_000, 10),
        event("free_requested", 1),
        event("free_completed", 1),
        event("alloc", 2, 3_000_000, 20),
        event("alloc", 3, 3_000_000, 20),
        event("segment_alloc", 99, 10**9),
        event("alloc", 4, 2_000_000, 30),
        event("free_completed", 2),
        event("alloc", 5, 1_000_000, 40),
    ]
    most, tensors = memory.at_most(events)
    assert most == 8_000_000
    assert memory.rows_of(tensors) == [
        {"mb": 6.0, "number": 2, "place": "encoder.py:20:forward"},
        {"mb": 2.0, "number": 1, "place": "encoder.py:30:forward"},
    ]
    graphs = memory.of_graphs(
        [
            {"address": 0, "total_size": 4, "segment_pool_id": (0, 0)},
            {"address": 4, "total_size": 2, "segment_pool_id": (0, 1)},
        ]
    )
    most, tensors = memory.at_most(events, graphs)
    assert most == 3_000_000 and [size for size, _ in tensors] == [2_000_000, 1_000_000]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is what it needs")
def test_memory_needs_a_gpu():
    command = [sys.executable, "benchmarks/memory.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no CUDA device")


def test_help_shows_how_to_run():
    """`--help` prints a script's docstring."""
    for script in (
        "mixers",
        "training",
        "inference",
        "loading",
        "memory",
        "epochs",
        "scan",
        "language_models",
        "cpu",
        "feed_forward",
    ):
        text = (ROOT / f"benchmarks/{script}.py").read_text()
        assert f"python benchmarks/{script}.py --" in ast.get_docstring(ast.parse(text))
        assert "description=__doc__," in text


REPORTS = [
    {"benchmark": "inference", "rows": [
        {"part": "lengths", "model": model, "seconds": s, "ms": s * slope, "peak_gb": slope}
        for model, slope in (("conmamba", 1), ("conformer-relpos", 2)) for s in (2, 4, 8)
    ]},
    {"benchmark": "inference", "rows": [{"part": "hour", "model": "conmamba", "ms": 1.0}]},
    {"benchmark": "decoding", "rows": [
        {"model": "Mamba decoder", "tokens": 10, "ms": 1.0},
        {"model": "Mamba decoder", "tokens": 20, "ms": 2.0},
        {"model": "Transformer decoder", "error": "OutOfMemoryError"},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("count, drawn", [(0, []), (2, ["lengths"]), (3, ["decoding", "lengths"])])
def test_figures_of_what_was_measured(tmp_path, count, drawn):
    pytest.importorskip("matplotlib")
    (tmp_path / "performance.json").write_text(json.dumps(REPORTS[:count]))
    command = [sys.executable, "figures/draw.py", "--output", tmp_path / "out",
               "--performance", tmp_path / "performance.json"]  # fmt: skip
    subprocess.run(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, check=True)
    found = {path.stem: path for path in (tmp_path / "out").iterdir()}
    assert sorted(found.keys() - {"architecture", "results"}) == drawn
    if "lengths" in found:
        text = " | ".join(re.findall(r"<text[^>]*>([^<]*)</text>", found["lengths"].read_text()))
        for word in ("ConMamba", "Conformer, relative positions", "peak memory, GB"):
            assert word in text


def test_decoding():
    printed, _ = run("decoding.py", "--device=cpu", "--size=tiny", "--batch=2", "--beam=3",
                     "--frames=20", "--tokens=4", "--lengths", "2", "--reference",
                     "--repeats=1", "--limit=0.1")  # fmt: skip
    rows = report_of(printed, "decoding")["rows"]
    for decoder in ("mamba", "transformer"):
        mine = [row for row in rows if row["decoder"] == decoder]
        assert [row["search"] for row in mine] == [
            *2 * ["ours"], *2 * ["speechbrain"], *2 * ["ours"]
        ]  # fmt: skip
        assert [row["tokens"] for row in mine] == [4, 4, 4, 4, 2, 2]
        assert len({row["model"] for row in mine}) == 4
        assert all(row["ms"] > 0 for row in mine)


def test_every_training_step_computes_its_features(tmp_path):
    """Though a benchmark has one batch for all of them."""
    brain = build("conmamba", "tiny", tmp_path, "cpu", "fp32")
    calls, compute = [], brain.hparams.compute_features.forward
    brain.hparams.compute_features.forward = lambda *x: calls.append(x) or compute(*x)
    batch = make_batch(brain, 2, 0.5)
    for _ in range(3):
        training_step(brain, batch)
    assert len(calls) == 3
