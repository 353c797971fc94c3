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


def makes_first_block(x, conv, dtype):
    """Whether one kernel makes the first block for x (B, T, F), of which nothing is learnt.

    Its products are those of tensor cores, of half precision.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    channels = conv.conv.out_channels
    sizes = channels in (16, 32, 64) and conv.columns == 16 and x.shape[2] <= 128
    return half and sizes and not torch.is_grad_enabled()


def first_block(x, lengths, taps, weight, bias, *, kernel_size, stride, eps, slope, reach):
    """A convolution of one channel, reflected at the edges, and what `norm_act_pad` does behind it.

    x: (B, T, F); lengths: (B,) in frames of x; taps: (C, columns), a patch's numbers as of
        `patches`, the bias, zeros; weight, bias: (F', C); kernel_size: frames and bins, as many
    -> (B, T' + 2 reach, F' + 2 reach, C) in taps' dtype, T' = (T - 1) // stride + 1
    """
    from modules.ops.norm_act_pad.triton import first_block

    return first_block(x, lengths, taps, weight, bias, kernel_size, stride, eps, slope, reach)


def _dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
