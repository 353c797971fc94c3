"""CTC by two Triton kernels, on CUDA devices, which the host need not wait for.

PyTorch's copies the lengths to the host, where a training step then waits for the forward pass
before it can launch what is behind it. Here the paths' sums from either end are made at once, by a
program each, and all frames' posteriors after them; a frame's are added in a fixed order.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import torch

from modules.ops import kernels
from modules.ops.backends import Call
from modules.ops.kernels import availability  # noqa: F401


def supports(call: Call) -> str:
    if call.dtype != torch.float32:
        return f"sums in float32, not in {call.dtype}"
    return kernels.supports(call)


def ctc(scores, labels, lengths, label_lengths, blank, needs_grad):
    """As `modules.ops.ctc.ctc`."""
    from modules.ops.ctc.triton_kernels import paths_kernel, posterior_kernel

    (B, T, C), U = scores.shape, labels.shape[1]
    scores, labels = scores.contiguous(), labels.contiguous()
    lengths, label_lengths = lengths.contiguous(), label_lengths.contiguous()
    states, ends = 2 * U + 1, 2 if needs_grad else 1
    sums = scores.new_empty(B, ends, T, states)
    losses = scores.new_empty(B)
    shared = (scores, labels, lengths, label_lengths, sums, losses)
    sizes, block = (T, C, U, blank), max(1 << (states - 1).bit_length(), 32)
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(scores):
        warps = min(max(block // 128, 1), 8)
        paths_kernel[(B, ends)](
            *shared, *sizes, ENDS=ends, STATES=block, num_warps=warps, num_stages=1
        )
        if not needs_grad:
            return losses, None
        grad = torch.empty_like(scores)
        # One warp, whose sums over states need no shared memory.
        posterior_kernel[(T, B)](*shared, grad, *sizes, STATES=block, num_warps=1, num_stages=1)
    return losses, grad
