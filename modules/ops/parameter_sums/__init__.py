"""What programs of a backward pass leave of parameters' gradients, added by one Triton kernel.

It writes each gradient as its parameter is, transposed and cast; a sum by PyTorch would take a copy
more for each of them. Rows are always added in the same order: two runs agree bit by bit.
"""

import torch

CHANNELS = 32  # a program's
ROWS = 128  # loaded at once: as many as a usual batch leaves


def parameter_sums(partial, weight, first=None, second=None):
    """The gradients of parameters, of which each of R programs has left a share.

    partial (G, R, K, D) float32, each (K, D) dense; the parameters: weight (G, D, N), of the first
    N rows of K, and first and second (G, D), of the next two, or None. Theirs may lack a G of 1.
    -> the parameters' gradients, sums over R, in new dense tensors; None for None
    """
    from modules.ops.parameter_sums.triton_kernels import sum_kernel

    gradients = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (weight, first, second)
    ]
    groups, rows, kinds, channels = partial.shape
    if groups * channels > 0:
        # Triton launches on the current device, whatever the tensors' own.
        with torch.cuda.device_of(partial):
            sum_kernel[(-(-channels // CHANNELS), kinds, groups)](
                partial,
                *gradients,
                *(rows, channels, *partial.stride()[:2]),
                N=weight.shape[-1],
                ROWS=ROWS,
                CHANNELS=CHANNELS,
                num_warps=8,
            )
    return gradients
