"""A program a (block of channels, row of a parameter, group)."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])  # one build for every batch
def sum_kernel(
    partial, dweight, dfirst, dsecond,
    rows, channels, partial_g, partial_r,
    N: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial (G, R, K, D) -> dweight (G, D, N), then dfirst and dsecond (G, D), or None."""
    k = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < channels
    partial += g * partial_g + k * channels + d[None, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        r = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        total += tl.load(partial + r * partial_r, mask=(r < rows) & mask[None, :], other=0.0)
    sum = tl.sum(total, axis=0)
    to = g * channels + d
    tl.store(dweight + to * N + k, sum.to(dweight.dtype.element_ty), mask=mask & (k < N))
    if dfirst is not None:
        tl.store(dfirst + to, sum.to(dfirst.dtype.element_ty), mask=mask & (k == N))
    if dsecond is not None:
        tl.store(dsecond + to, sum.to(dsecond.dtype.element_ty), mask=mask & (k == N + 1))
