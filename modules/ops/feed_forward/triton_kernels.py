# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernel of a feed-forward branch: one program a block of frames, for all hidden channels.

A frame's D channels are in parts of powers of two, as D is none: WIDTHS at STARTS, 128 and 16 of
144. Masked up to a power of two, the products would take 1.8 times as long.
"""

import triton
import triton.language as tl

from modules import activation
from modules.ops import kernels

INTERPRETED = tl.constexpr(kernels.interpreting())
# PyTorch's numbers, as a Triton function; Triton's interpreter calls Python's as it stands.
tail_power = activation.tail_power if INTERPRETED else triton.jit(activation.tail_power)


@triton.jit
def dot(a, b, total):
    """total + a b; the interpreter multiplies bfloat16's bits, where it is not kept from it."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def gelu(z):
    """z Phi(z) in float32, as `modules.activation.ShortGELU`."""
    a = tl.abs(z)
    return 0.5 * z + a * (0.5 - tl.exp2(tail_power(a)))


@triton.jit
def load_rows(
    x, row, rows, D: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, POLICY: tl.constexpr
):
    """Frames `row` (ROWS,) of x (rows, D) in float32: (ROWS, WIDTH) a part; zero past the last."""
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        d = STARTS[i] + tl.arange(0, WIDTHS[i])
        place = x + row[:, None] * D + d[None, :]
        part = tl.load(place, mask=row[:, None] < rows, other=0.0, eviction_policy=POLICY)
        parts = parts + (part.to(tl.float32),)
    return parts


@triton.jit
def layer_norm(
    parts, weight, bias, eps, D: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr
):
    """LayerNorm of each frame, of which the parts are given."""
    total = tl.sum(parts[0], axis=1)
    for i in tl.static_range(1, len(WIDTHS)):
        total += tl.sum(parts[i], axis=1)
    mean = (total / D)[:, None]
    squares = tl.zeros_like(total)
    for i in tl.static_range(len(WIDTHS)):
        squares += tl.sum((parts[i] - mean) * (parts[i] - mean), axis=1)
    deviation = tl.rsqrt(squares / D + eps)[:, None]
    normed = ()
    for i in tl.static_range(len(WIDTHS)):
        d = STARTS[i] + tl.arange(0, WIDTHS[i])
        w = tl.load(weight + d).to(tl.float32)[None, :]
        b = tl.load(bias + d).to(tl.float32)[None, :]
        normed = normed + ((parts[i] - mean) * deviation * w + b,)
    return normed


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out_weight, out_bias, out,
    rows, eps, out_eps, scale,
    D: tl.constexpr, HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, STARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CLOSES: tl.constexpr,
):  # fmt: skip
    """x, out (rows, D); weight1 (HIDDEN, D); weight2 (D, HIDDEN); BLOCK hidden channels a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = weight1.dtype.element_ty
    values = load_rows(x, row, rows, D, WIDTHS, STARTS, "evict_last")
    values = layer_norm(values, norm_weight, norm_bias, eps, D, WIDTHS, STARTS)
    normed = ()
    sums = ()
    for i in tl.static_range(len(WIDTHS)):
        normed = normed + (values[i].to(dtype),)
        sums = sums + (tl.zeros((ROWS, tl.constexpr(WIDTHS[i])), tl.float32),)
    # Loaded a block ahead, to registers: on their way through shared memory, as the weights go,
    # these few numbers would take as many instructions as the weights.
    bias = tl.load(bias1 + tl.arange(0, BLOCK))
    for start in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
        h = start + tl.arange(0, BLOCK)
        z = tl.broadcast_to(bias.to(tl.float32)[None, :], (ROWS, BLOCK))
        for i in tl.static_range(len(WIDTHS)):
            d = STARTS[i] + tl.arange(0, WIDTHS[i])
            w = tl.load(weight1 + h[None, :] * D + d[:, None])
            z = dot(normed[i], w, z)
        bias = tl.load(bias1 + h + BLOCK, mask=h + BLOCK < HIDDEN, other=0.0)
        hidden = gelu(z).to(dtype)
        new = ()
        for i in tl.static_range(len(WIDTHS)):
            d = STARTS[i] + tl.arange(0, WIDTHS[i])
            w = tl.load(weight2 + d[None, :] * HIDDEN + h[:, None])
            new = new + (dot(hidden, w, sums[i]),)
        sums = new
    # Read again, from the L2 cache: the loop needs the registers. By another policy, as otherwise
    # the compiler makes one read of the two.
    values = load_rows(x, row, rows, D, WIDTHS, STARTS, "evict_first")
    results = ()
    for i in tl.static_range(len(WIDTHS)):
        d = STARTS[i] + tl.arange(0, WIDTHS[i])
        b = tl.load(bias2 + d).to(tl.float32)[None, :]
        results = results + (values[i] + scale * (sums[i] + b),)
    if CLOSES:
        results = layer_norm(results, out_weight, out_bias, out_eps, D, WIDTHS, STARTS)
    for i in tl.static_range(len(WIDTHS)):
        d = STARTS[i] + tl.arange(0, WIDTHS[i])
        place = out + row[:, None] * D + d[None, :]
        tl.store(place, results[i].to(out.dtype.element_ty), mask=row[:, None] < rows)
