"""Triton kernels of CTC, and over the rows (V,) of logits.

Blank i is what stands before label i; the last blank, behind all labels, has no label. A pair of
labels and the blanks before them, 2 j and 2 j + 1, are the states 4 j to 4 j + 3, and a thread's.

Seen from its end an utterance is another one, with frames and labels in reverse order; so one
kernel adds up the paths from either end, and `sums` (B, 2, T, states) holds what it finds, each in
its own order, with a frame's own score in both. Their logarithms are to base 2, of which the
device has instructions.
"""

import triton
import triton.language as tl

from modules.ops.kernels import interpreting

# The logarithm of no path. Finite, since inf less inf is NaN; what is beyond LEAST has no path.
NONE = tl.constexpr(-1e30)
LEAST = tl.constexpr(-1e29)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ALL = tl.constexpr(tl.PropagateNan.ALL)
INTERPRETED = tl.constexpr(interpreting())
# Whose scores are on their way: a frame takes about 180 cycles, memory 300 to 700.
FRAMES = tl.constexpr(4)


@triton.jit
def log2(x):
    """Of a number from 1 to 2, off by 2^-22: a path's logarithm has no such digit."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log2_sum(a, b):
    """log2(2^a + 2^b), by one exponential; NaN stays."""
    return tl.maximum(a, b) + log2(1.0 + tl.exp2(-tl.abs(a - b)))


@triton.jit
def load_scores(pointer, mask=None, other=None):
    # Minus infinity is no path; NaN stays.
    return tl.maximum(tl.load(pointer, mask=mask, other=other) * LOG2E, NONE, propagate_nan=ALL)


@triton.jit
def column_of(labels, i, count, blank, end):
    """The column of label i, blank's where there is none; `end` is 1 for them in reverse order."""
    mask = (i >= 0) & (i < count)
    i = tl.where(end == 0, i, count - 1 - i)
    return tl.where(mask, tl.load(labels + i, mask=mask, other=0).to(tl.int32), blank)


@triton.jit
def frame_scores(row, blank, even, odd):
    return load_scores(row + blank), load_scores(row + even), load_scores(row + odd)


@triton.jit
def frames_scores(scores, first, step, t, last, columns, blank, even, odd):
    """Of frames t, t + 1, ..., or of the last instead of what is past it."""
    found = ()
    for k in tl.static_range(FRAMES):
        row = scores + (first + step * tl.minimum(t + k, last)) * columns
        found += (frame_scores(row, blank, even, odd),)
    return found


@triton.jit
def paths_kernel(
    scores, labels, lengths, label_lengths, sums, losses,
    frames, columns, most, blank,
    ENDS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Graves' recursion from one end of an utterance, and from the first end the loss.

    A pair's states stay in registers, and the next pair gets the one that it wants by a shuffle
    where all are one warp's: no frame waits for memory or other threads. States past the last
    blank are computed as well; paths go from a state to later ones alone, and so none of theirs
    comes back.
    """
    b = tl.program_id(0).to(tl.int64)
    end = tl.program_id(1)
    length = tl.load(lengths + b).to(tl.int32)
    count = tl.load(label_lengths + b).to(tl.int32)
    pair = tl.arange(0, PAIRS)
    labels += b * most
    even = column_of(labels, 2 * pair, count, blank, end)
    odd = column_of(labels, 2 * pair + 1, count, blank, end)
    even_skips = (pair > 0) & (even != column_of(labels, 2 * pair - 1, count, blank, end))
    odd_skips = odd != even
    previous = tl.maximum(pair - 1, 0)

    # Before the first frame the path of no label.
    even_blank = tl.where(pair == 0, 0.0, NONE)
    even_label = tl.full((PAIRS,), NONE, tl.float32)
    odd_blank, odd_label = even_label, even_label

    states = 4 * (most // 2 + 1)
    s = tl.arange(0, 4 * PAIRS)
    mask = s < states
    out = sums + (b * ENDS + end) * frames * states
    scores += b * frames * columns
    last = tl.maximum(length - 1, 0)
    first = tl.where(end == 0, 0, last)
    step = tl.where(end == 0, 1, -1)
    following = frames_scores(scores, first, step, 0, last, columns, blank, even, odd)
    for t in range(0, length, FRAMES):
        now = following
        following = frames_scores(scores, first, step, t + FRAMES, last, columns, blank, even, odd)
        for k in tl.static_range(FRAMES):
            blank_score, even_score, odd_score = now[k]
            before = tl.where(pair > 0, tl.gather(odd_label, previous, 0), NONE)
            # What a label follows is what its blank follows, or the blank alone.
            odd_start = log2_sum(odd_blank, even_label)
            even_start = log2_sum(even_blank, before)
            odd_from = tl.where(odd_skips, odd_start, odd_blank)
            even_from = tl.where(even_skips, even_start, even_blank)
            odd_label = log2_sum(odd_label, odd_from) + odd_score
            even_label = log2_sum(even_label, even_from) + even_score
            odd_blank, even_blank = odd_start + blank_score, even_start + blank_score
            total = tl.join(tl.join(even_blank, odd_blank), tl.join(even_label, odd_label))
            total = tl.reshape(total, (4 * PAIRS,))
            tl.store(out + (t + k) * states + s, total, mask=mask & (t + k < length))
    if end == 0:
        path = tl.where(count == 0, 0.0, NONE)
        if length > 0:
            tl.debug_barrier()  # all threads' states of the last frame are written
            out += last * states + 2 * count
            label = tl.load(out - 1, mask=count > 0, other=NONE)
            path = log2_sum(tl.load(out), label)
        tl.store(losses + b, tl.where(path < LEAST, float("inf"), -path * LN2))


@triton.jit
def posterior_kernel(
    scores, labels, lengths, label_lengths, sums, losses, grad,
    frames, columns, most, blank,
    LABELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A frame's softmax less posterior; 0 past the end and where there is no path.

    The labels' posteriors are written over their sums from the first end, which no other program
    reads. Each column's thread goes through all of them then, and adds its own in their order.
    """
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    count = tl.load(label_lengths + b).to(tl.int32)
    loss = tl.load(losses + b)
    counts = (t < length) & (loss != float("inf"))
    i = tl.arange(0, LABELS)
    is_label = (i < count) & counts
    is_blank = (i <= count) & counts
    labels += b * most
    row = (b * frames + t) * columns
    states = 4 * (most // 2 + 1)
    ahead = sums + (b * 2 * frames + t) * states
    behind = sums + (b * 2 * frames + frames + length - 1 - t) * states + 2 * count
    column = tl.load(labels + i, mask=is_label, other=0)
    label_paths = tl.load(ahead + 2 * i + 1, mask=is_label, other=NONE)
    label_paths += tl.load(behind - 2 * i - 1, mask=is_label, other=NONE)
    label_paths -= load_scores(scores + row + column, is_label, 0.0)
    blank_paths = tl.load(ahead + 2 * i, mask=is_blank, other=NONE)
    blank_paths += tl.load(behind - 2 * i, mask=is_blank, other=NONE)
    blank_paths -= load_scores(scores + row + blank)
    # Divided by this frame's total, not by the loss, whose rounding over all frames is another.
    top = tl.max(tl.maximum(label_paths, blank_paths), axis=0)
    of_labels = tl.where(is_label, tl.exp2(label_paths - top), 0.0)
    of_blanks = tl.where(is_blank, tl.exp2(blank_paths - top), 0.0)
    of_blank = tl.sum(of_blanks, axis=0)
    total = of_blank + tl.sum(of_labels, axis=0)
    of_blank /= total
    tl.debug_barrier()  # all threads have read what is written over
    tl.store(ahead + 2 * i + 1, of_labels / total, mask=is_label)
    tl.debug_barrier()  # other threads' labels are there
    for from_column in range(0, columns, COLUMNS):
        c = from_column + tl.arange(0, COLUMNS)
        here = tl.where(c == blank, of_blank, 0.0)
        for n in range(0, tl.where(counts, count, 0)):
            here += tl.where(c == tl.load(labels + n).to(tl.int32), tl.load(ahead + 2 * n + 1), 0.0)
        probability = tl.exp(tl.load(scores + row + c, mask=c < columns, other=0.0))
        value = tl.where(counts, probability - here, 0.0)
        tl.store(grad + row + c, value, mask=c < columns)


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
        # The difference first: of products one alone would be rounded, and 1e30 has none to spare.
        total += tl.exp2((x.to(tl.float32) - highest) * LOG2E)
    tl.store(out + tl.program_id(0), highest + tl.log(tl.sum(total, axis=0)))


@triton.jit(do_not_specialize=["frames", "count"])
def scaled_softmax_kernel(
    logits, normalizers, factors, given, values, out, units, frames, count,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One program a row and block of columns: the softmax, then the values of the columns given."""
    columns = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    mask = column < columns
    factor = tl.load(factors + row)
    x = tl.load(logits + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.exp(x - tl.load(normalizers + row)) * factor
    value = tl.where(factor == 0, 0.0, value)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # another thread may have written there
    i = tl.arange(0, GIVEN)
    column = tl.load(given + (row // frames) * count + i, mask=i < count, other=-1)
    here = (column >= first) & (column < first + COLUMNS)
    value = tl.load(values + row * count + i, mask=here, other=0.0) * factor
    value = tl.where(factor == 0, 0.0, value)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=here)
