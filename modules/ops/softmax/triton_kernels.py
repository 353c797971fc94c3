"""Triton kernels over the rows (V,) of logits; arithmetic is float32."""

import triton
import triton.language as tl


@triton.jit
def normalizers_kernel(logits, out, columns, COLUMNS: tl.constexpr):
    """The logarithm of a row's sum of exponentials, one program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        mask = first + column < columns
        x = tl.load(logits + row * columns + first + column, mask=mask, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.where(x > top, x, top)
        # Less itself: an infinite top would give NaN.
        total = tl.where(top == higher, total, total * tl.exp(top - higher))
        total += tl.where(x == higher, mask.to(tl.float32), tl.exp(x - higher))
        top = higher
    highest = tl.max(top, axis=0)
    total = tl.sum(tl.where(top == highest, total, total * tl.exp(top - highest)), axis=0)
    tl.store(out + row, highest + tl.log(total))


@triton.jit
def scaled_softmax_kernel(logits, normalizers, factors, out, columns, COLUMNS: tl.constexpr):
    """Softmax times the row's factor, one program a row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    factor = tl.load(factors + row)
    x = tl.load(logits + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.exp(x - tl.load(normalizers + row)) * factor
    value = tl.where(factor == 0, 0.0, value)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)
