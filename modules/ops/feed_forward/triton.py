"""The feed-forward branch by one Triton kernel; forward alone.

A program keeps its frames' norms and sums, and goes over the hidden channels in blocks: their
numbers, 26 MB each way of a small model's batch, never leave the multiprocessor. Sums, GELU and
norms are float32. One frame's result depends on no other frame.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernel on a CPU, for tests.
"""

import os

import torch

SHARED = 232448  # bytes of shared memory that a program may have, and nearly that two
MULTIPROCESSORS = 132


def fits(channels, hidden, on_gpu):
    """Whether there is a kernel for D channels and so many hidden ones.

    There is none where the environment has MAMBA_ASR_FEED_FORWARD_BACKEND=torch.
    """
    if os.environ.get("MAMBA_ASR_FEED_FORWARD_BACKEND") == "torch":
        return False
    sizes = channels % 16 == 0 and 16 <= channels <= 256 and hidden % 64 == 0
    # Others have less shared memory, or multiply otherwise, and nobody measured it there.
    return sizes and (not on_gpu or torch.cuda.get_device_capability()[0] == 9)


# A graph asks once, when it is made. It is what `torch.compiler.assume_constant_result` sets, which
# imports TorchDynamo: two seconds of every command's start.
fits._dynamo_marked_constant = True


def parts_of(channels):
    """-> widths, starts: channels, a multiple of 16, in parts of powers of two"""
    widths = [1 << bit for bit in range(8, 3, -1) if channels >> bit & 1]
    return tuple(widths), tuple(sum(widths[:i]) for i in range(len(widths)))


def sizes_of(frames, channels):
    """-> frames of a program, hidden channels at a time, how many such blocks are in memory

    A program reads both weights whole, from the L2 cache. Two programs of 64 frames share a
    multiprocessor, where one multiplies while the other is at its GELU. Of more channels it has
    place for one alone, of 128 frames unless a batch has too few of them for all multiprocessors.
    """

    def taken(rows, stages):  # bytes, by 64 hidden channels at a time
        return 2 * channels * (rows + stages * 2 * 64)

    if taken(64, 2) <= SHARED // 2:
        return 64, 64, 2
    rows = 128 if frames > 64 * MULTIPROCESSORS else 64
    return rows, 64 if taken(128, 3) <= SHARED else 32, 3


@torch.library.custom_op("mamba_asr::residual_feed_forward", mutates_args=())
def operator(
    x: torch.Tensor, weights: list[torch.Tensor], eps: float, closing_eps: float, scale: float
) -> torch.Tensor:
    """x (B, T, D) -> (B, T, D)

    weights: weight and bias of norm, of the first and the second product, and of the closing norm
        where there is one.
    """
    from modules.ops.feed_forward.triton_kernels import forward_kernel

    channels, hidden = x.shape[-1], weights[2].shape[0]
    x, out, frames = x.contiguous(), _shapes(x, weights), x.numel() // channels
    rows, block, stages = sizes_of(frames, channels)
    widths, starts = parts_of(channels)
    closes = len(weights) > 6
    weights = [t.contiguous() for t in weights] + [None] * (8 - len(weights))
    if frames:
        # Triton launches on the current device, whatever the tensors' own.
        with torch.cuda.device_of(x):
            forward_kernel[(-(-frames // rows),)](
                *(x, *weights, out, frames, eps, closing_eps, scale),
                **{"D": channels, "HIDDEN": hidden, "WIDTHS": widths, "STARTS": starts},
                **{"ROWS": rows, "BLOCK": block, "STAGES": stages, "CLOSES": closes},
                num_warps=rows // 16,
            )
    return out


@operator.register_fake
def _shapes(x, weights, *numbers):
    closes = len(weights) > 6
    dtype = torch.float32 if closes else torch.promote_types(x.dtype, weights[2].dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)
