"""The gated mean by one Triton kernel forward and one backward, on CUDA devices.

It is bound by memory: y and z are read once each way and alone kept between. The mean gives both
directions the same gradient, so one is written and returned for both, expanded. z may be strided
by rows; arithmetic is float32.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import torch
from torch.autograd.function import once_differentiable

from modules.ops.kernels import availability, dense_rows, interpreting, supports  # noqa: F401

CHANNELS = 1024  # a program's, at most: 16 bytes of bf16 a thread


def gated_mean(y, z):
    """As `modules.ops.gating.gated_mean`; no double backward."""
    return _GatedMean.apply(y, z)


class _GatedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z):
        from modules.ops.gating.triton_kernels import forward_kernel

        y, z = dense_rows(y), dense_rows(z)
        ctx.save_for_backward(y, z)
        out = torch.empty(z.shape, dtype=y.dtype, device=y.device)
        _launch(forward_kernel, (y, z, out), (*y.stride()[:3], *z.stride()[:2]), z.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        from modules.ops.gating.triton_kernels import backward_kernel

        y, z = ctx.saved_tensors
        dout = dense_rows(dout)
        dy, dz = (torch.empty(z.shape, dtype=x.dtype, device=x.device) for x in (y, z))
        strides = (*y.stride()[:3], *z.stride()[:2], *dout.stride()[:2])
        _launch(backward_kernel, (y, z, dout, dy, dz), strides, z.shape)
        return dy.expand(y.shape), dz


def _launch(kernel, tensors, strides, shape):
    """Run a program a frame, block of channels and utterance."""
    batch, frames, channels = shape
    if batch * frames * channels == 0:
        return
    block = min(CHANNELS, max(1 << (channels - 1).bit_length(), 64))
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(tensors[0]):
        kernel[(frames, -(-channels // block), batch)](
            *tensors, channels, *strides, CHANNELS=block, num_warps=max(block // 256, 1)
        )
