"""Scans without gradients: of few frames, as streams have them, and of exported graphs."""

import pytest
import torch

from modules.errors import UserError
from modules.ops import selective_scan as scan_package
from modules.ops.selective_scan import chunked, selective_scan
from tests.ops.test_selective_scan import make


def compared(leaves, lengths, reverse, **options):
    """What naive gives, and the chunked backend; what padding holds means nothing."""
    frames = leaves["u"].shape[1]
    if lengths is not None:
        padded = torch.arange(frames) >= lengths[:, None]
        nan = {
            n: leaves[n].masked_fill(padded[:, :, None], float("nan"))
            for n in ["u", "dt", "B", "C"]
        }
        leaves = leaves | nan
    options |= {"reverse": reverse, "lengths": lengths, "return_state": True}
    return [selective_scan(**leaves, **options, backend=b) for b in ("naive", "chunked")]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("leave_out", [(), ("D", "z", "dt_bias"), ("initial_state",)], ids=str)
@pytest.mark.parametrize("frames", [1, 8, 33])
def test_few_frames_equal_naive(reverse, leave_out, frames, monkeypatch):
    whole, calls = chunked._scan_one_block, []
    monkeypatch.setattr(chunked, "_scan_one_block", lambda *a: calls.append(None) or whole(*a))
    leaves = {k: v.detach() for k, v in make(frames, leave_out=leave_out).items()}
    kept = {k: v.clone() for k, v in leaves.items()}
    for lengths in (None, torch.tensor([frames, max(frames - 3, 0), 0])):
        for softplus in (True, False):
            expected, got = compared(leaves, lengths, reverse, dt_softplus=softplus)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert len(calls) == 4
    assert all(torch.equal(leaves[k], kept[k]) for k in kept)  # nothing is done in place to them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_frames_are_those_of_training(dtype):
    leaves = make(12, dtype=dtype)
    options = {"dt_softplus": True, "return_state": True, "backend": "chunked"}
    y, state = selective_scan(**leaves, **options)
    with torch.no_grad():
        y_few, state_few = selective_scan(**leaves, **options)
    assert (y_few.dtype, state_few.dtype) == (y.dtype, state.dtype)
    torch.testing.assert_close(
        (y_few, state_few), (y, state), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    selective_scan(**leaves, **options)[
        0
    ].sum().backward()  # where there are gradients, they are kept
    assert leaves["u"].grad.abs().sum() > 0


# ---- Exported graphs ----


@pytest.mark.parametrize("backend", ["scan", "doubling", "scripted"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("leave_out", [(), ("D", "z", "dt_bias", "initial_state")], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 17])
@torch.no_grad()
def test_backends_of_exported_graphs_equal_naive(backend, reverse, leave_out, frames):
    leaves = {k: v.detach() for k, v in make(frames, leave_out=leave_out).items()}
    for lengths in (None, torch.tensor([frames, max(frames - 3, 0), 0])):
        if lengths is not None:  # what padding holds means nothing
            for name in ("u", "dt", "B", "C"):
                padded = torch.arange(frames) >= lengths[:, None]
                leaves[name] = leaves[name].masked_fill(padded[:, :, None], float("nan"))
        options = {"reverse": reverse, "lengths": lengths, "dt_softplus": True}
        options["return_state"] = True
        expected = selective_scan(**leaves, **options, backend="naive")
        with scan_package.exporting(backend):
            got = selective_scan(**leaves, **options, backend="naive")
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_backends_of_exported_graphs_have_no_gradient():
    with pytest.raises(UserError, match="has no gradient"):
        selective_scan(**make(3), backend="doubling")
