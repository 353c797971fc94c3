"""CTC prefixes by two Triton kernels in place of some forty of PyTorch's, on CUDA devices.

A search runs both for each token, and its sums over a few hundred frames are short: the number of
kernels is what they cost. A program has a hypothesis with all of its frames, and sums in float64.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import torch

from modules.ops.backends import OK, Call
from modules.ops.kernels import availability, interpreting  # noqa: F401

FRAMES = 4096  # a program's, at most: 8 a thread


def supports(call: Call) -> str:
    if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
        return f"runs on cuda, not on {call.device}"
    if call.dtype != torch.float64:
        return f"sums in float64, not in {call.dtype}"
    if call.width > FRAMES:
        return f"holds at most {FRAMES} frames, not {call.width}"
    return OK


def extend(probs, rows, valid, blanks, blank, total, predecessors, repeats):
    """As `pytorch.extend`."""
    from modules.ops.ctc_prefix.triton_kernels import extend_kernel

    new_blank, new_total = torch.empty_like(blank), torch.empty_like(total)
    tensors = (probs, rows, valid, blanks, blank, total, predecessors, repeats)
    _launch(extend_kernel, len(rows), (*tensors, new_blank, new_total), probs.shape[1])
    return new_blank, new_total


def weights(probs, rows, valid, blank, total):
    """As `pytorch.weights`."""
    from modules.ops.ctc_prefix.triton_kernels import weights_kernel

    out = torch.empty(valid.shape, dtype=probs.dtype, device=probs.device)
    largest, again = (out.new_empty(len(rows), 1) for _ in range(2))
    tensors = (probs, rows, valid, blank, total, out, largest, again)
    _launch(weights_kernel, len(rows), tensors, probs.shape[1])
    return out, largest, again


def _launch(kernel, programs, tensors, frames):
    block = max(1 << (frames - 1).bit_length(), 128)
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, frames, FRAMES=block, num_warps=min(max(block // 256, 4), 16))
