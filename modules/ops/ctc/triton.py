"""CTC and its softmax by Triton kernels, on CUDA devices, which the host need not wait for.

PyTorch's copies the lengths to the host, where a training step then waits for the forward pass
before it can launch what is behind it. Here the paths' sums from either end are made at once, by a
program each, and all frames' posteriors after them; a frame's are added in a fixed order. Of the
whole vocabulary logits are read and a gradient is written, in their own dtype.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import math

import torch

from modules.ops.kernels import availability, interpreting, supports  # noqa: F401

COLUMNS = 1024  # of logits, a program's at a time


def ctc(scores, labels, lengths, label_lengths, blank, needs_grad):
    """As `modules.ops.ctc.ctc`."""
    from modules.ops.ctc.triton_kernels import paths_kernel, posterior_kernel

    (B, T, C), U = scores.shape, labels.shape[1]
    scores, labels = scores.contiguous(), labels.contiguous()
    lengths, label_lengths = lengths.contiguous(), label_lengths.contiguous()
    ends, pairs = 2 if needs_grad else 1, U // 2 + 1  # the last blank may be one's alone
    sums = scores.new_empty(B, ends, T, 4 * pairs)
    losses = scores.new_empty(B)
    shared = (scores, labels, lengths, label_lengths, sums, losses)
    sizes, block = (T, C, U, blank), power_of_two(pairs)
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(scores):
        # A pair a thread while there are threads: two take longer than warps wait for each other.
        warps = min(block // 32, 8)
        paths_kernel[(B, ends)](
            *shared, *sizes, ENDS=ends, PAIRS=block, num_warps=warps, num_stages=1
        )
        if not needs_grad:
            return losses, None
        grad = torch.empty_like(scores)
        blocks = {"LABELS": power_of_two(U + 1), "COLUMNS": min(power_of_two(C), 128)}
        # One warp, whose sums need no shared memory.
        posterior_kernel[(T, B)](*shared, grad, *sizes, **blocks, num_warps=1, num_stages=1)
    return losses, grad


def normalizers(logits):
    """As `modules.ops.ctc.normalizers`."""
    from modules.ops.ctc.triton_kernels import normalizers_kernel

    logits = logits.contiguous()
    out = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    _launch(normalizers_kernel, (out.numel(),), (logits, out))
    return out


def scaled_softmax(logits, normalizers, factors, columns, values):
    """As `modules.ops.ctc.scaled_softmax`."""
    from modules.ops.ctc.triton_kernels import scaled_softmax_kernel

    logits, count = logits.contiguous(), columns.shape[1]
    out = torch.empty_like(logits)
    grid = factors.numel(), -(-logits.shape[2] // COLUMNS)
    given = (normalizers, factors, columns, values)
    tensors = (logits, *(x.contiguous() for x in given), out)
    _launch(scaled_softmax_kernel, grid, tensors, logits.shape[1], count, GIVEN=power_of_two(count))
    return out


def power_of_two(least):
    """The next one, from a warp's threads."""
    return max(1 << (least - 1).bit_length(), 32)


def _launch(kernel, grid, tensors, *numbers, **constants):
    logits, columns = tensors[0], tensors[0].shape[2]
    if logits.numel() == 0:
        return
    # As many neighbours as a thread may load and store at once: rows start at multiples of it.
    unit = math.gcd(columns, 8)
    block = min(COLUMNS, max(1 << (columns - 1).bit_length(), 64))
    with torch.cuda.device_of(logits):
        kernel[grid](
            *(*tensors, columns // unit, *numbers),
            **{"UNIT": unit, "COLUMNS": block} | constants,
            num_warps=max(block // 256, 1),
        )
