"""What ends a block of the frontend: LayerNorm, leaky ReLU, dropout, the next block's padding.

And what begins the first: an utterance's patches, whose product with the weights is a convolution.
"""

import os

import torch

from modules.ops import kernels
from modules.ops.backends import OK, Call


def supports(x, reach):
    """Whether the kernels do it for x (B, T, F, C); else PyTorch's parts do, one after another.

    They always do where the environment has MAMBA_ASR_FRONTEND_BACKEND=torch.
    """
    if os.environ.get("MAMBA_ASR_FRONTEND_BACKEND") == "torch":
        return False
    call = Call(x.device.type, _dtype(x), 1, True, initial_state=False, return_state=False)
    able = x.is_cuda and kernels.supports(call) == OK and kernels.availability() == OK
    return able and not torch.compiler.is_compiling() and x.shape[2] > reach


def norm_act_pad(x, weight, bias, lengths, *, eps, slope, dropout=0.0, reach=0, offset=None):
    """LayerNorm over a frame, leaky ReLU, dropout; each utterance reflected at its own ends.

    x: (B, T, F, C); weight, bias: (F, C); lengths: (B,)
    eps, slope: LayerNorm's, the ReLU's; dropout: what share of numbers becomes zero
    reach: how many frames and bins are added at each edge, F > reach. An utterance too short to
        reflect repeats its nearest frame.
    offset: (C,), added to x before, such as the bias of the convolution that gave x; or None
    -> (B, T + 2 reach, F + 2 reach, C) in x's dtype, zero past an utterance's reflected end.
    """
    from modules.ops.norm_act_pad.triton import NormActPad

    return NormActPad.apply(x, offset, weight, bias, lengths, eps, slope, dropout, reach)


def patches(x, lengths, kernel_size, stride, reach, columns, dtype):
    """The patches that a convolution of one channel looks at, each utterance reflected at its ends.

    x: (B, T, F), F > reach, without a gradient; lengths: (B,); kernel_size: frames and bins
    -> (B, T', F', columns) in dtype: a patch's numbers, frame by frame, then ones. What lies past
        an utterance's reflected end is zero.
    """
    from modules.ops.norm_act_pad.triton import patches

    return patches(x, lengths, kernel_size, stride, reach, columns, dtype)


def _dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
