"""One Triton kernel forward and one backward: the input is read once each way, and kept alone.

PyTorch's parts go eleven times over the largest tensors of a small model, most of them in float32.
What dropout drops is drawn again in the backward pass (`modules.dropout`).
"""

import torch
from torch.autograd.function import once_differentiable

ROWS = 8  # frames of a program forward, which reads the weights once for all of them
PROGRAMS = 264  # backward, two for each of an H100's multiprocessors; each adds up its gradients
REGISTERS = 128  # a thread, as many as let two programs run there at a time


class NormActPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offset, weight, bias, lengths, eps, slope, dropout, reach):
        from modules.ops.norm_act_pad.triton_kernels import forward_kernel

        x = x.contiguous()
        B, T, F, C = x.shape
        out = x.new_empty(B, T + 2 * reach, F + 2 * reach, C)
        stats = torch.empty(2, B, T, dtype=torch.float32, device=x.device)
        keys = torch.empty(2, dtype=torch.int32, device=x.device)
        if dropout:
            keys.random_(-(2**31), 2**31 - 1)
        offset = None if offset is None else offset.contiguous()
        given = (offset, weight.contiguous(), bias.contiguous(), lengths.contiguous())
        shared = (x, *given, keys, stats)
        width, parts = parts_of(F * C, C)
        sizes = {"BINS": F, "CHANNELS": C, "REACH": reach, "WIDTH": width, "PARTS": parts}
        scale = 1 / (1 - dropout) if dropout < 1 else 0.0
        numbers = (T, B, slope, int(2**32 * dropout) - 2**31, scale)
        sizes |= {"DROPS": dropout > 0}
        if x.numel():
            # Triton launches on the current device, whatever the tensors' own.
            with torch.cuda.device_of(x):
                grid = -(-out.shape[1] // ROWS), B
                block = max(1 << (C - 1).bit_length(), 16)
                forward_kernel[grid](
                    *(*shared, out, *numbers, eps),
                    **(sizes | {"BIN": block, "ROWS": ROWS}),
                    num_warps=warps_of(width, parts, 20),
                )
        ctx.save_for_backward(*shared)
        ctx.numbers, ctx.sizes = numbers, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        from modules.ops.norm_act_pad.triton_kernels import backward_kernel

        x, offset, weight, *_ = shared = ctx.saved_tensors
        dx, programs = torch.empty_like(x), min(PROGRAMS, max(1, x.shape[0] * x.shape[1]))
        sums = torch.empty(programs, 2, *weight.shape, dtype=torch.float32, device=x.device)
        doffsets = None
        if offset is not None:
            doffsets = sums.new_empty(programs, min(ctx.sizes["WIDTH"], weight.numel()))
        with torch.cuda.device_of(x):  # without frames too: all sums are written there
            backward_kernel[(programs,)](
                *(*shared, dout.contiguous(), dx, sums, doffsets, *ctx.numbers),
                **ctx.sizes,
                num_warps=warps_of(ctx.sizes["WIDTH"], ctx.sizes["PARTS"], 10),
                maxnreg=REGISTERS,
            )
        dweight, dbias = sums.sum(0).to(weight.dtype)
        if offset is not None:
            doffsets = doffsets.view(-1, len(offset)).sum(0).to(offset.dtype)
        return dx, doffsets, dweight, dbias, *[None] * 5


def parts_of(size, channels):
    """-> width, parts: a row's numbers in up to seven parts of a power of two, of whole bins"""
    width = size & -size  # the largest power of two that divides them
    if width >= 16 and width % channels == 0 and size // width < 8:
        return width, size // width
    return 1 << (size - 1).bit_length(), 1


def warps_of(width, parts, each):
    """So many that a thread has about `each` numbers of a row, and of each part one or more."""
    wanted = 1 << max(width * parts // (32 * each), 1).bit_length() - 1
    return min(wanted, max(width // 32, 1), 16)


def patches(x, lengths, kernel_size, stride, reach, columns, dtype):
    """As `modules.ops.norm_act_pad.patches`."""
    from modules.ops.norm_act_pad.triton_kernels import patches_kernel

    B, T, F = x.shape
    outputs, places = (
        (size + 2 * reach - width) // stride + 1
        for size, width in zip((T, F), kernel_size, strict=True)
    )
    out = x.new_empty(B, outputs, places, columns, dtype=dtype)
    sizes = {"BINS": F, "REACH": reach, "STRIDE": stride, "PLACES": places, "COLUMNS": columns}
    sizes |= {"TIME": kernel_size[0], "WIDE": kernel_size[1], "ROWS": ROWS}
    if out.numel():
        with torch.cuda.device_of(x):
            patches_kernel[-(-outputs // ROWS), B](
                *(x.contiguous(), lengths.contiguous(), out, T, outputs),
                **sizes,
                WIDTH=1 << (places * columns - 1).bit_length(),
            )
    return out
