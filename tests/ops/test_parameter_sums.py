"""The sums of what programs leave equal PyTorch's in float64, as the parameters are.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch

from modules.ops import parameter_sums as sums
from tests.ops.interpreted import (
    DEVICE,
    INTERPRETED,
    assert_near,
    compile_kernel,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 6


def make(groups, rows, channels, width):
    """-> partial (G, R, N + 2, D), weight (G, D, N) in bfloat16, two vectors (G, D)"""
    generator = torch.Generator().manual_seed(rows)
    partial = torch.randn(groups, rows, width + 2, channels, generator=generator)
    weight = torch.empty(groups, width, channels, dtype=torch.bfloat16).mT  # the gradient is dense
    first, second = torch.empty(2, groups, channels)
    return [x.to(DEVICE) for x in (partial, weight, first.half(), second)]


@runs_kernels
@pytest.mark.parametrize("absent", [(), (0,), (0, 1)])
@pytest.mark.parametrize("size", [(2, 300, 40, 3), (1, 1, 5, 16)])
def test_equals_torch_in_double(size, absent):
    partial, weight, *vectors = make(*size)
    width = size[-1]
    for i in absent:
        vectors[i] = None
    across = partial.transpose(0, 1).contiguous().transpose(0, 1)  # rows first
    got = sums.parameter_sums(partial, weight, *vectors)
    again = sums.parameter_sums(across, weight, *vectors)
    total = partial.double().sum(1)
    expected = [total[:, :width].mT, total[:, width], total[:, width + 1]]
    storages = set()
    for given, other, x, y in zip(got, again, (weight, *vectors), expected, strict=True):
        assert (given is None) == (x is None)
        if x is not None:
            assert given.dtype == x.dtype and given.is_contiguous() and torch.equal(given, other)
            tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
            assert_near([given.double()], [y], tolerance)
            storages.add(given.untyped_storage().data_ptr())
    assert len(storages) == 3 - len(absent)


@runs_kernels
def test_no_rows_make_zeros_and_no_channels_nothing():
    partial, weight, *vectors = make(2, 0, 5, 3)
    for gradient in sums.parameter_sums(partial, weight, *vectors):
        assert gradient.count_nonzero() == 0
    partial, weight, *vectors = make(2, 4, 0, 3)
    assert sums.parameter_sums(partial, weight, *vectors)[0].shape == (2, 0, 3)


@installed
@pytest.mark.skipif(INTERPRETED, reason="the interpreter hides the compiler")
def test_compiles_for_an_h200():
    from modules.ops.parameter_sums.triton_kernels import sum_kernel

    constants = {"N": 16, "ROWS": sums.ROWS, "CHANNELS": sums.CHANNELS}
    registers, spilled, ptx = compile_kernel(sum_kernel, "fp32", constants, 8)
    assert spilled == 0 and registers <= 64
    assert "ld.global.v4.b32" in ptx, "four channels a thread, in one load"
