"""The depthwise convolution by one Triton kernel forward and one backward, on CUDA devices.

Channels stay last, so nothing is transposed but the weight. The forward reads x once and writes y;
the backward reads x and dy, writes dx, and sums the gradients of the weight and the bias on the
way, in float32 and in an order of their own: two runs agree bit by bit. Only arguments are kept
between them. x may be strided by rows.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import torch

from modules.ops import kernels
from modules.ops.backends import OK, Call
from modules.ops.kernels import availability, dense_rows, interpreting  # noqa: F401
from modules.ops.operator import Operator
from modules.ops.parameter_sums import parameter_sums

WIDEST = 63
CHANNELS = 64  # a program's, one a thread: K taps, K inputs and K sums of each fill its registers
# Frames loaded ahead: enough arithmetic, K or 2 K multiply-adds a frame, to wait for them. Half of
# them above K = 32, where registers are short (the backward at K = 63 spills) and compilers slow.
CHUNK = 8
BACKWARD_CHUNK = 4
# Frames a program, at most; each reads K - 1 more, and in the backward writes sums of 4 (K + 1)
# bytes a channel. At K = 31, B 32, T 400, D 512 make 1024 and 768 programs: by their registers an
# H200 holds all of them at once.
FRAMES = 128
BACKWARD_FRAMES = 160


def supports(call: Call) -> str:
    reason = kernels.supports(call)
    if reason != OK:
        return reason
    if call.width > WIDEST:
        return f"has kernels of size 1 to {WIDEST}, not {call.width}"
    return OK


def depthwise_conv1d(x, weight, bias, lengths):
    """As `modules.ops.depthwise_conv1d.depthwise_conv1d`; no double backward."""
    return _operator(x, weight, bias, lengths)[0]


def _forward(x, weight, bias, lengths):
    from modules.ops.depthwise_conv1d.triton_kernels import forward_kernel

    (y,) = _shapes(x)
    x, taps = dense_rows(x), _taps(x, weight)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan = _tiles(x.shape[1], len(taps), FRAMES, CHUNK)
    _launch(forward_kernel, (x, taps, bias, lengths.contiguous(), y), x.stride()[:2], plan)
    return (y,)


def _shapes(x, *_):
    """As `_forward`, of empty tensors."""
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


def _backward(gradients, args, kept):
    """As an `Operator` wants it."""
    from modules.ops.depthwise_conv1d.triton_kernels import backward_kernel

    x, weight, bias, lengths = args
    x, dy, taps = dense_rows(x), dense_rows(gradients[0]), _taps(x, weight)
    (dx,) = _shapes(x)
    batch, frames, channels = x.shape
    plan = _tiles(frames, len(taps), BACKWARD_FRAMES, BACKWARD_CHUNK)
    shape = (batch * plan[0], len(taps) + 1, channels)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    strides = (*x.stride()[:2], *dy.stride()[:2])
    _launch(backward_kernel, (x, taps, lengths.contiguous(), dy, dx, partial), strides, plan)
    dweight, dbias, _ = parameter_sums(partial[None], weight, bias)
    return [dx, dweight] if bias is None else [dx, dweight, dbias]


_operator = Operator(
    "depthwise_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, Tensor lengths",
    outputs=1,
    results=1,
    forward=_forward,
    backward=_backward,
    shapes=_shapes,
)


def _taps(x, weight):
    """weight (D, K) in x's dtype, turned to (K, D) so that neighbouring threads read neighbours."""
    taps = weight.t()
    if taps.dtype == x.dtype and taps.is_contiguous():  # as it lies already
        return taps
    return torch.empty(taps.shape, dtype=x.dtype, device=x.device).copy_(taps)


def _tiles(frames, width, longest, chunk):
    """-> how many programs share the frames, each one's share in whole chunks, and the chunk"""
    chunk = chunk if width <= 32 else chunk // 2
    tiles = -(-frames // longest)
    tile = max(-(-frames // (max(tiles, 1) * chunk)), 1) * chunk
    return -(-frames // tile), tile, chunk


def _launch(kernel, tensors, strides, plan):
    """Run a program a block of channels, tile of frames and utterance; x, taps come first."""
    x, taps = tensors[:2]
    batch, frames, channels = x.shape
    tiles, tile, chunk = plan
    if x.numel() == 0:
        return
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(x):
        kernel[(-(-channels // CHANNELS), tiles, batch)](
            *tensors,
            *(frames, channels, tile, *strides),
            WIDTH=len(taps),
            CHUNK=chunk,
            CHANNELS=CHANNELS,
            num_warps=CHANNELS // 32,
        )
