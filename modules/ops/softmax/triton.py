"""By one Triton kernel each, on CUDA devices: logits are read once, a gradient is written once.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import torch

from modules.ops.kernels import availability, interpreting, supports  # noqa: F401

COLUMNS = 4096  # a program's, at a time


def normalizers(logits):
    """As `modules.ops.softmax.normalizers`."""
    from modules.ops.softmax.triton_kernels import normalizers_kernel

    logits = logits.contiguous()
    out = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    _launch(normalizers_kernel, (out.numel(),), (logits, out))
    return out


def scaled_softmax(logits, normalizers, factors):
    """As `modules.ops.softmax.scaled_softmax`."""
    from modules.ops.softmax.triton_kernels import scaled_softmax_kernel

    logits, factors = logits.contiguous(), factors.contiguous()
    out = torch.empty_like(logits)
    grid = factors.numel(), -(-logits.shape[2] // COLUMNS)
    _launch(scaled_softmax_kernel, grid, (logits, normalizers, factors, out))
    return out


def _launch(kernel, grid, tensors):
    logits = tensors[0]
    if logits.numel() == 0:
        return
    block = min(COLUMNS, max(1 << (logits.shape[2] - 1).bit_length(), 64))
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(logits):
        kernel[grid](*tensors, logits.shape[2], COLUMNS=block, num_warps=max(block // 512, 1))
