"""A product of tiles in Triton kernels, also in the interpreter."""

import triton
import triton.language as tl

from modules.ops import kernels

INTERPRETED = tl.constexpr(kernels.interpreting())


@triton.jit
def dot(a, b, total):
    """total + a b; the interpreter multiplies bfloat16's bits, where it is not kept from it."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)
