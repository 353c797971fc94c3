"""Triton kernels of CTC, and over the rows (V,) of logits.

State 2 i is the blank before label i, state 2 i + 1 that label.

Seen from its end an utterance is another one, with frames and labels in reverse order; so one
kernel adds up the paths from either end, and `sums` (B, 2, T, states) holds what it finds, each in
its own order, with a frame's own score in both.
"""

import triton
import triton.language as tl

# The logarithm of no path. Finite, since inf less inf is NaN; what is beyond LEAST has no path.
NONE = tl.constexpr(-1e30)
LEAST = tl.constexpr(-1e29)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def columns_of(labels, s, count, blank, end):
    """The column of each state s; `end` is 1 for labels in reverse order."""
    i = s // 2
    i = tl.where(end == 0, i, count - 1 - i)
    is_label = (s % 2 == 1) & (s < 2 * count + 1)
    return tl.where(is_label, tl.load(labels + i, mask=is_label, other=0).to(tl.int32), blank)


@triton.jit
def load_scores(row, column, mask):
    score = tl.load(row + column, mask=mask, other=NONE)
    return tl.where(score < NONE, NONE, score)  # NaN stays


@triton.jit
def paths_kernel(
    scores, labels, lengths, label_lengths, sums, losses,
    frames, columns, most, blank,
    ENDS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Graves' recursion from one end of an utterance, and from the first end the loss."""
    b = tl.program_id(0).to(tl.int64)
    end = tl.program_id(1)
    length = tl.load(lengths + b).to(tl.int32)
    count = tl.load(label_lengths + b).to(tl.int32)
    s = tl.arange(0, STATES)
    mask = s < 2 * count + 1
    column = columns_of(labels + b * most, s, count, blank, end)
    before = columns_of(labels + b * most, s - 2, count, blank, end)
    skips = mask & (s % 2 == 1) & (s > 1) & (column != before)
    states = 2 * most + 1
    out = sums + (b * ENDS + end) * frames * states
    first = tl.where(end == 0, 0, length - 1)
    step = tl.where(end == 0, columns, -columns)
    row = scores + (b * frames + first) * columns
    total = tl.where(s < 2, load_scores(row, column, mask & (length > 0)), NONE)
    # With no frame there is a path of no label.
    total = tl.where((length == 0) & (s == 0), 0.0, total)
    tl.store(out + s, total, mask=mask & (length > 0))
    row += step
    score = load_scores(row, column, mask & (length > 1))
    for i in range(1, length):
        row += step
        following = load_scores(row, column, mask & (i + 1 < length))  # is there when wanted
        tl.debug_barrier()  # other threads' states of the frame before are written
        one = tl.load(out + s - 1, mask=mask & (s > 0), other=NONE)
        two = tl.load(out + s - 2, mask=skips, other=NONE)
        most_likely = tl.maximum(total, tl.maximum(one, two))
        added = tl.exp(total - most_likely) + tl.exp(one - most_likely) + tl.exp(two - most_likely)
        total = tl.where(mask, most_likely + tl.log(added) + score, NONE)
        out += states
        tl.store(out + s, total, mask=mask)
        score = following
    if end == 0:
        last = tl.where((s == 2 * count) | (s == 2 * count - 1), total, NONE)
        most_likely = tl.max(last, axis=0)
        path = most_likely + tl.log(tl.sum(tl.exp(last - most_likely), axis=0))
        tl.store(losses + b, tl.where(path < LEAST, float("inf"), -path))


@triton.jit
def posterior_kernel(
    scores, labels, lengths, label_lengths, sums, losses, grad,
    frames, columns, most, blank,
    STATES: tl.constexpr,
):  # fmt: skip
    """A frame's softmax less posterior; 0 past the end and where there is no path."""
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    count = tl.load(label_lengths + b).to(tl.int32)
    loss = tl.load(losses + b)
    counts = (t < length) & (loss != float("inf"))
    s = tl.arange(0, STATES)
    mask = (s < 2 * count + 1) & counts
    column = columns_of(labels + b * most, s, count, blank, 0)
    row = (b * frames + t) * columns
    score = load_scores(scores + row, column, mask)
    states = 2 * most + 1
    ahead = sums + (b * 2 * frames + t) * states
    behind = sums + (b * 2 * frames + frames + length - 1 - t) * states
    paths = tl.load(ahead + s, mask=mask, other=NONE)
    paths += tl.load(behind + 2 * count - s, mask=mask, other=NONE)
    posterior = tl.where(mask, tl.exp(paths - score + loss), 0.0)
    for c in range(0, columns):
        here = tl.sum(tl.where(column == c, posterior, 0.0), axis=0)
        probability = tl.exp(tl.load(scores + row + c))
        tl.store(grad + row + c, tl.where(counts, probability - here, 0.0))


@triton.jit
def normalizers_kernel(logits, out, units, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    """The logarithm of a row's sum of exponentials, one program a row of units * UNIT columns."""
    columns = units * UNIT
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for first in range(0, columns, COLUMNS):
        mask = first + column < columns
        x = tl.load(logits + row + first + column, mask=mask, other=float("-inf"))
        top = tl.maximum(top, x.to(tl.float32))
    highest = tl.max(top, axis=0)
    # Infinity less infinity would be NaN.
    highest = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):  # from the cache
        mask = first + column < columns
        x = tl.load(logits + row + first + column, mask=mask, other=float("-inf"))
        total += tl.exp2(tl.fma(x.to(tl.float32), LOG2E, -highest * LOG2E))
    tl.store(out + tl.program_id(0), highest + tl.log(tl.sum(total, axis=0)))


@triton.jit
def scaled_softmax_kernel(
    logits, normalizers, factors, out, units, UNIT: tl.constexpr, COLUMNS: tl.constexpr
):
    """Softmax times the row's factor, one program a row and block of columns."""
    columns = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    factor = tl.load(factors + row)
    x = tl.load(logits + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.exp(x - tl.load(normalizers + row)) * factor
    value = tl.where(factor == 0, 0.0, value)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)
