"""The causal convolution by Triton kernels, one or both directions in a launch, on CUDA devices.

It is bound by memory: the forward reads x once and writes every direction's result, the backward
reads x and the gradients and writes one dx. Only arguments are kept between them. The lengths' mask
and SiLU happen inside, x may be strided by rows, sums are float32, and no result depends on the
order in which programs run.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import torch
from torch.autograd.function import once_differentiable

from modules.ops import kernels
from modules.ops.backends import OK, Call
from modules.ops.kernels import availability, dense_rows, interpreting  # noqa: F401
from modules.ops.operator import Operator
from modules.ops.parameter_sums import parameter_sums

CHANNELS = 128  # a program's, two a thread: a warp reads 128 bytes of bf16 at once
CHUNK = 4  # frames loaded ahead
CHUNK_OF_TWO = 2  # of two gradients: as many bytes, and registers, as without the second
# Frames a program, at most; each reads its taps again, and in the backward writes sums of
# 4 (K + 1) bytes a channel and direction. B 32, T 400, D 1024 make 1792 and 1024 programs: by
# their registers an H200 holds all of them at once.
FRAMES = 64
BACKWARD_FRAMES = 128


def supports(call: Call) -> str:
    reason = kernels.supports(call)
    if reason != OK:
        return reason
    if not 2 <= call.width <= 8:
        return f"has kernels of size 2 to 8, not {call.width}"
    if call.initial_state or call.return_state:
        return "runs without a state"
    return OK


def causal_conv1d(x, weight, bias, activation, lengths, reverse, initial_state, return_state):
    """As `naive.causal_conv1d`, without a state -> result, None; no double backward."""
    bias = None if bias is None else bias[None]
    silu = activation == "silu"
    (y,) = _operator(x, weight[None], bias, lengths, silu, not reverse, reverse)
    return y.squeeze(0), None  # y[0] would copy the gradient


def bidirectional_conv1d(x, weights, biases, lengths, activation):
    """As `modules.ops.causal_conv1d.bidirectional_conv1d`."""
    return _operator(x, weights, biases, lengths, activation == "silu", True, True)[0]


def bidirectional_conv1d_twice(x, weights, biases, lengths, activation):
    """The same for two readers: a pair in the same memory."""
    return _Twice.apply(x, weights, biases, lengths, activation == "silu")


class _Twice(torch.autograd.Function):
    """Autograd would add the readers' gradients by a pass over both, for the kernel to read."""

    @staticmethod
    def forward(ctx, x, weights, biases, lengths, silu):
        (y,) = _operator(x, weights, biases, lengths, silu, True, True)
        ctx.save_for_backward(x, weights, biases, lengths)
        ctx.silu = silu
        return y, y.view_as(y)  # not by `detach`, which recomputation leaves as it is

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, more):
        args = (*ctx.saved_tensors, ctx.silu, True, True)
        dx, dweights, dbiases = _operator.differentiate([dy, more], [], args)
        return dx, dweights, dbiases, None, None


def _forward(x, weights, biases, lengths, silu, forward, reverse):
    """x (B, T, D), weights (directions, D, K), biases (directions, D) -> (directions, B, T, D)"""
    from modules.ops.causal_conv1d.triton_kernels import forward_kernel

    (y,) = _shapes(x, weights)
    x = dense_rows(x)
    weights, biases, lengths = (
        None if t is None else t.contiguous() for t in (weights, biases, lengths)
    )
    frames, channels, width = *x.shape[1:], weights.shape[2]
    tiles, tile = _tiles(frames + width - 1, FRAMES)
    _launch(
        forward_kernel,
        (x, weights, biases, lengths, y),
        (frames, channels, tile, *x.stride()[:2]),
        (tiles, x.shape[0]),
        **{"FORWARD": forward, "REVERSE": reverse, "SILU": silu, "WIDTH": width},
    )
    return (y,)


def _shapes(x, weights, *_):
    """As `_forward`, of empty tensors."""
    return (torch.empty(len(weights), *x.shape, dtype=x.dtype, device=x.device),)


def _backward(gradients, args, kept):
    """As an `Operator` wants it, of one gradient or the sum of two."""
    from modules.ops.causal_conv1d.triton_kernels import backward_kernel

    x, weights, biases, lengths, silu, forward, reverse = args
    dy, more = (*gradients, None)[:2]
    if more is not None:
        dy, more = dy.contiguous(), more.contiguous()
    x, dy = dense_rows(x), dense_rows(dy)
    taps, offsets, lengths = (
        None if t is None else t.contiguous() for t in (weights, biases, lengths)
    )
    batch, frames, channels = x.shape
    directions, _, width = weights.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, tile = _tiles(frames, BACKWARD_FRAMES)
    shape = (batch * tiles, directions, width + 1, channels)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(
        backward_kernel,
        (x, taps, offsets, lengths, dy, more, dx, partial),
        (frames, channels, tile, *x.stride()[:2], *dy.stride()[:3]),
        (tiles, batch),
        **{"FORWARD": forward, "REVERSE": reverse, "SILU": silu, "WIDTH": width},
        chunk=CHUNK if more is None else CHUNK_OF_TWO,
    )
    dweights, dbiases, _ = parameter_sums(partial.transpose(0, 1), weights, biases)
    return [dx, dweights] if biases is None else [dx, dweights, dbiases]


_operator = Operator(
    "causal_conv1d",
    "Tensor x, Tensor weights, Tensor? biases, Tensor? lengths, bool silu, bool forward, "
    "bool reverse",
    outputs=1,
    results=1,
    forward=_forward,
    backward=_backward,
    shapes=_shapes,
)


def _tiles(steps, longest):
    """-> how many programs share so many steps, and the steps of each: whole chunks, even shares"""
    tiles = -(-steps // longest)
    tile = -(-steps // (tiles * CHUNK)) * CHUNK
    return -(-steps // tile), tile


def _launch(kernel, tensors, numbers, programs, chunk=CHUNK, **constants):
    channels = tensors[0].shape[2]
    if tensors[0].numel() == 0:
        return
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(tensors[0]):
        kernel[(-(-channels // CHANNELS), *programs)](
            *tensors,
            *numbers,
            **constants,
            CHUNK=chunk,
            CHANNELS=CHANNELS,
            num_warps=CHANNELS // 64,
        )
