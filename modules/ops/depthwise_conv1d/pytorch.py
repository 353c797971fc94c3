"""The depthwise convolution by PyTorch's own, on any device."""

from torch.nn import functional as F  # noqa: N812

from modules.ops.backends import OK, Call
from modules.ops.padding import padding_mask


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def depthwise_conv1d(x, weight, bias, lengths):
    """As `modules.ops.depthwise_conv1d.depthwise_conv1d`."""
    if x.numel() == 0:
        return x.clone()
    channels, width = weight.shape
    x = x.masked_fill(padding_mask(lengths, x.shape[1]), 0.0).transpose(1, 2)
    weight = weight.to(x.dtype).unsqueeze(1)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv1d(x, weight, bias, padding=width // 2, groups=channels).transpose(1, 2)
