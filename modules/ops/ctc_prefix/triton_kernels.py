"""Triton kernels of CTC prefixes: a program a hypothesis r, with all frames t in registers."""

import triton
import triton.language as tl

MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b))"""
    largest = tl.maximum(a, b)
    # Of two infinities the difference is none.
    total = largest + tl.log(1.0 + tl.exp(-tl.abs(a - b)))
    return tl.where(largest == MINUS_INF, MINUS_INF, total)


@triton.jit
def add(a, b):
    return a + b


@triton.jit(do_not_specialize=["frames"])  # one build for every number of frames of a block
def extend_kernel(
    probs, token_rows, valid, blanks, in_blank, either, predecessors, repeats, new_blank, new_total,
    frames,
    FRAMES: tl.constexpr,
):  # fmt: skip
    """Everything contiguous; blanks, in_blank and either (`blank` and `total`) (R, 1 + T)."""
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, FRAMES)
    row = tl.load(token_rows + r)
    before = tl.load(predecessors + r) * (frames + 1)
    after = r * (frames + 1)
    inside = t < frames
    there = tl.load(valid + r * frames + t, mask=inside, other=0) != 0
    log_p = tl.log(tl.load(probs + row * frames + t, mask=there, other=1.0))
    if tl.load(repeats + r) != 0:
        phi = tl.load(in_blank + before + t, mask=inside, other=MINUS_INF)
    else:
        phi = tl.load(either + before + t, mask=inside, other=MINUS_INF)
    sums = tl.associative_scan(log_p, 0, add)
    nonblank = sums + tl.associative_scan(phi - (sums - log_p), 0, log_add)
    nonblank = tl.where(there, nonblank, MINUS_INF)

    only_blanks = tl.load(blanks + after + t + 1, mask=inside, other=0.0)
    heard = tl.associative_scan(nonblank - only_blanks, 0, log_add)
    heard = tl.gather(heard, tl.maximum(t - 1, 0), 0)  # of the frames before
    ending = tl.where(t == 0, MINUS_INF, only_blanks + heard)
    tl.store(new_blank + after + t + 1, ending, mask=inside)
    tl.store(new_total + after + t + 1, log_add(nonblank, ending), mask=inside)
    tl.store(new_blank + after, MINUS_INF)
    tl.store(new_total + after, MINUS_INF)


@triton.jit(do_not_specialize=["frames"])
def weights_kernel(
    probs,
    token_rows,
    valid,
    in_blank,
    either,
    weights,
    largest,
    again,
    frames,
    FRAMES: tl.constexpr,
):
    """As `extend_kernel`; weights (R, T), largest and again (R,)."""
    r = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, FRAMES)
    row = tl.load(token_rows + r)
    inside = t < frames
    there = tl.load(valid + r * frames + t, mask=inside, other=0) != 0
    before = tl.load(either + r * (frames + 1) + t, mask=there, other=MINUS_INF)
    most = tl.max(before, 0)
    most = tl.where(most == MINUS_INF, 0.0, most)
    tl.store(weights + r * frames + t, tl.exp(before - most), mask=inside)
    tl.store(largest + r, most)

    log_p = tl.log(tl.load(probs + row * frames + t, mask=there, other=1.0))
    more = tl.load(in_blank + r * (frames + 1) + t, mask=there, other=MINUS_INF) + log_p
    most = tl.max(more, 0)
    most = tl.where(most == MINUS_INF, 0.0, most)
    tl.store(again + r, most + tl.log(tl.sum(tl.exp(more - most), 0)))
