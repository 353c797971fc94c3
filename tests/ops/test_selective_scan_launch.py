"""Around the kernels of the selective scan: what is refused and copied, programs, registers."""

import pytest
import torch
from test_selective_scan import make

from modules.ops.backends import Call
from modules.ops.selective_scan import available_backends, selective_scan, triton
from modules.ops.selective_scan.triton_extent import EXTENTS, extent_of
from tests.ops.interpreted import DEVICE, compile_kernel, installed


def test_what_it_refuses():
    call = {"width": 16, "needs_grad": True, "initial_state": True, "return_state": True}
    assert triton.supports(Call(device="cuda", dtype=torch.bfloat16, **call)) == "ok"
    assert "float64" in triton.supports(Call(device="cuda", dtype=torch.float64, **call))
    assert "cpu" in triton.supports(Call(device="cpu", dtype=torch.float32, **call))
    if DEVICE == "cpu":
        assert "CUDA" in available_backends()["triton"]


@pytest.mark.parametrize(
    "scans, channels, expected",
    [
        (58, 288, 32),  # 522 programs for 528 schedulers
        (59, 288, 40),  # 531, or 472 of 40 channels
        (64, 288, 40),
        (66, 288, 40),
        (67, 288, 32),  # of either some scheduler has two
        (124, 288, 32),
        (20, 1024, 40),
        (35, 1024, 32),
        (64, 1024, 32),
        (1, 8, 32),
        (0, 288, 32),
    ],
)
def test_fewest_waits_for_the_last_scheduler(scans, channels, expected):
    assert extent_of(scans, channels, torch.device("cpu")).channels == expected


def test_never_chosen_on_a_cpu(monkeypatch):
    monkeypatch.setattr(triton, "selective_scan", None)
    assert selective_scan(**make(3, dtype=torch.float32)).shape == (3, 3, 5)


# What is None, apart from the gate in the forward, changes little: two variants a dtype suffice.
@installed
@pytest.mark.parametrize(
    "dtype, states, absent, extent",
    [
        ("bf16", 16, {"z", "dz", "initial", "dfinal", "dinitial", "total"}, EXTENTS[0]),
        ("bf16", 16, {"z", "dz", "initial", "dfinal", "dinitial", "total"}, EXTENTS[1]),
        ("fp32", 4, {"D", "dt_bias", "lengths"}, EXTENTS[0]),
    ],
)
def test_compiles_for_an_h200(dtype, states, absent, extent):
    from modules.ops.selective_scan.triton_backward import backward_kernel
    from modules.ops.selective_scan.triton_kernels import forward_kernel
    from modules.ops.selective_scan.triton_sums import message_kernel

    packed = dtype == "bf16"
    given = {"SOFTPLUS": True, "N": states, "SEGMENT": triton.SEGMENT}
    given |= {"PACKED": packed, "EXTRA": extent.extra}

    def compiled(kernel, absent, most=extent.registers, chunk=triton.CHUNK):
        constants = dict.fromkeys(absent) | given | {"CHUNK": chunk}
        pointers = {"BC": "i32" if packed else "fp32"}
        return compile_kernel(kernel, dtype, constants, 1, most, **pointers)[:2]

    if "total" not in absent:  # time in pieces
        assert compiled(forward_kernel, absent | {"y", "starts", "z", "initial"})[1] == 0
        assert compiled(message_kernel, absent)[1] == 0
        absent = absent | {"total"}
    forward = forward_kernel, extent.registers, triton.CHUNK
    for kernel, most, chunk in (forward, (backward_kernel, None, extent.chunk)):
        registers, spilled = compiled(kernel, absent, most, chunk)
        assert registers <= (most or 255)
        assert spilled <= 400, "bytes, far more than when it was measured"


@pytest.mark.parametrize("dtype, rank", [(torch.bfloat16, 6), (torch.float32, 5)])
def test_parts_of_one_product_are_not_copied(dtype, rank):
    """B and C as a layer has them: behind the step's `rank` channels."""
    product = torch.randn(2, 3, 7, rank + 8).to(dtype)
    _, B, C = product.split([rank, 4, 4], -1)
    BC = triton._beside(B, C)
    assert BC.data_ptr() == B.data_ptr()
    assert BC.stride(2) * BC.element_size() == B.stride(2) * B.element_size()
    expected = triton._beside(B.clone(), C.clone())
    assert expected.stride(2) == expected.shape[3] and torch.equal(BC, expected)


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: (x[..., 4:8], x[..., :4]),  # C first
        lambda x: (x[..., :4], x.clone()[..., 4:8]),
        lambda x: (x[:, :, :5, :4], x[:, :, :5, 4:8]),  # rows with a gap after each utterance
        lambda x: (x[..., 1:5], x[..., 5:9]),  # from the middle of a word
        lambda x: (x[..., :4], x[..., 5:9]),
    ],
)
def test_other_parts_are_copied(parts):
    B, C = parts(torch.randn(2, 3, 7, 10).bfloat16())
    BC = triton._beside(B, C)
    assert BC.is_contiguous() and torch.equal(BC.view(torch.bfloat16), torch.cat((B, C), -1))
