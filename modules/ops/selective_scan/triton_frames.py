# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""What the selective scan's Triton kernels do for a frame; names as in `triton_kernels`."""

import triton
import triton.language as tl

from modules.ops.selective_scan.triton_layout import LANES, load_row, per_lane

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 within 4e-7 of its value."""
    # Least relative error of a polynomial; a quotient would take as many instructions again.
    p = -0.0085392026
    p = p * x + 0.044089619
    p = p * x - 0.10768171
    p = p * x + 0.17745242
    p = p * x - 0.24495463
    p = p * x + 0.33275479
    p = p * x - 0.49997404
    p = p * x + 0.99999982
    return x * p


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1; a division would ask first whether x is a large one."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def step_size(dt, bias, valid, SOFTPLUS: tl.constexpr):
    """dt as projected -> the step, its derivative.

    Both are zero if the frame is not valid or, by a bias of -inf, there is no such channel.
    """
    x = dt.to(tl.float32) + bias
    if SOFTPLUS:
        x = tl.where(valid, x, float("-inf"))
        e = tl.exp2(-tl.abs(x) * LOG2E)
        slope = tl.where(x >= 0, 1.0, e) * reciprocal(1.0 + e)
        x = tl.maximum(x, 0.0) + log1p(e)
    else:
        valid = valid & (bias > float("-inf"))
        x = tl.where(valid, x, 0.0)
        slope = tl.where(valid, 1.0, 0.0)
    return x, slope


@triton.jit
def silu_and_slope(z):
    """silu(z), its derivative."""
    z = z.to(tl.float32)
    sigmoid = reciprocal(1.0 + tl.exp2(-z * LOG2E))
    silu = z * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def position(k, length, start, sign):
    """The k-th frame of the scan, in time; the nearest valid one's if there is no such frame."""
    return start + sign * tl.maximum(tl.minimum(k, length - 1), 0)


@triton.jit
def at(p, t, stride):
    """p + t stride; in bytes and without signs, as then it takes one instruction."""
    element: tl.constexpr = p.dtype.element_ty
    size: tl.constexpr = element.primitive_bitwidth // 8
    bytes = tl.cast(tl.cast(stride * size, tl.uint32), tl.uint64) * t.to(tl.uint32).to(tl.uint64)
    return (p.to(tl.pointer_type(tl.int8)) + bytes).to(tl.pointer_type(element))


@triton.jit
def place(lengths, frames, piece_frames, utterances, reverse_from):
    """What the program scans.

    -> piece (over all scans), scan, its group, its utterance, the piece's first frame, its frames,
    how many of them are valid, that with which the scan begins, 1 or -1 if time runs backwards
    """
    piece = tl.program_id(1)
    pieces = tl.cdiv(frames, piece_frames)
    scan = piece // pieces
    first = (piece % pieces) * piece_frames
    group = scan // utterances
    b = scan % utterances
    length = frames
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + b), frames).to(tl.int32)
    frames = tl.minimum(frames - first, piece_frames)
    length = tl.minimum(tl.maximum(length - first, 0), frames)
    # The first frame of the scan, and the step to the next.
    reverse = (scan >= reverse_from).to(tl.int32)
    start, sign = reverse * (length - 1), 1 - 2 * reverse
    return (
        piece.to(tl.int64), scan.to(tl.int64), group.to(tl.int64), b.to(tl.int64),
        first.to(tl.int64), frames, length, start, sign,
    )  # fmt: skip


@triton.jit
def parameter(p, group, channels, d):
    """A parameter (groups, D) at channels d in float32; zero if there is none."""
    if p is None:
        x = tl.zeros([LANES], tl.float32)
    else:
        x = tl.load(p + group * channels + d).to(tl.float32)
    return x


@triton.jit
def bias_of(dt_bias, group, channels, d):
    """As `parameter`; -inf at channels that there are not, whose step is zero then."""
    bias = parameter(dt_bias, group, channels, tl.minimum(d, channels - 1))
    return tl.where(d < channels, bias, float("-inf"))


@triton.jit
def load_frame(u, dt, z, BC, t, u_t, dt_t, z_t, words, N: tl.constexpr, PACKED: tl.constexpr):
    """-> u, dt and z (0 if there is none) of frame t, its row of B and C"""
    gate = 0.0 if z is None else tl.load(at(z, t, z_t))
    row = load_row(at(BC, t, words), N, PACKED)
    return tl.load(at(u, t, u_t)), tl.load(at(dt, t, dt_t)), gate, row


@triton.jit
def decays_of(steps, A, N: tl.constexpr):
    PER: tl.constexpr = per_lane(N)
    decays = ()
    for i in tl.static_range(len(steps)):
        for n in tl.static_range(PER):
            decays = decays + (tl.exp2(steps[i] * A[i * PER + n]),)
    return decays


@triton.jit
def advance(h, decays, dt_u, B, N: tl.constexpr):
    """The states one frame on."""
    PER: tl.constexpr = per_lane(N)
    new = ()
    for i in tl.static_range(len(dt_u)):
        for n in tl.static_range(PER):
            new = new + (decays[i * PER + n] * h[i * PER + n] + dt_u[i] * B[n],)
    return new


@triton.jit
def read_out(h, C, N: tl.constexpr):
    """C h of a frame: a lane's share for each of its channels."""
    PER: tl.constexpr = per_lane(N)
    y = ()
    for i in tl.static_range(len(h) // PER):
        share = h[i * PER] * C[0]
        for n in tl.static_range(1, PER):
            share += h[i * PER + n] * C[n]
        y = y + (share,)
    return y
