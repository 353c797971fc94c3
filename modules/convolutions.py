"""The frontend's convolutions over frames and bins: SpeechBrain's, in another layout on GPUs."""

import torch
from speechbrain.nnet.CNN import Conv2d
from torch import nn
from torch.nn import functional as F  # noqa: N812


class ChannelsLastConv2d(Conv2d):
    """SpeechBrain's convolution, on CUDA devices without its copies of the layout.

    It turns (B, T, F, C) into (B, C, F, T) and back, and every kernel before and after it then
    copies its input. To the bit it is the same on CPUs alone, where the layout costs little.
    """

    def forward(self, x):
        """x (B, T, F) or (B, T, F, C), padded already -> (B, T', F', C')"""
        return self.in_place(x) if x.is_cuda else super().forward(x)

    def apart(self, x):
        """x (B, T, F, C) -> (B, T', F', C') without the bias, and the bias (C',) to be added.

        cuDNN adds none: PyTorch passes over the result once more, and over its gradient.
        """
        return self.in_place(x, biased=False), self.conv.bias

    def in_place(self, x, biased=True):
        weight = self.conv.weight.transpose(2, 3)  # (C', C, time, frequency)
        if not self.unsqueeze:
            weight = weight.contiguous(memory_format=torch.channels_last)
            bias, groups = self.conv.bias if biased else None, self.conv.groups
            y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, self.stride, groups=groups)
            return y.permute(0, 2, 3, 1)
        # Of one channel every patch is a row, and the convolution a product.
        time, bins = weight.shape[2:]
        patches = x.unfold(1, time, self.stride[0]).unfold(2, bins, self.stride[1]).flatten(3)
        return self.product(F.pad(patches, (0, self.columns - time * bins), value=1.0))

    @property
    def columns(self):
        """Numbers of a patch of one channel, and one or more ones: tensor cores want whole eights.

        A column of ones has the bias, whose gradient then costs no sum over all patches.
        """
        return self.conv.weight[0, 0].numel() // 8 * 8 + 8

    def product(self, patches):
        """Patches (B, T', F', columns), frame by frame -> (B, T', F', C')"""
        weight = self.conv.weight.transpose(2, 3).flatten(1)
        weight = torch.cat([weight, self.conv.bias.unsqueeze(1)], dim=1)
        return F.linear(patches, F.pad(weight, (0, self.columns - weight.shape[1])))


class SeparableConv2d(nn.Sequential):
    """Every channel by itself, then all channels of a place: (B, T, F, C) -> (B, T', F', C').

    SpeechBrain's `DepthwiseSeparableConv2d` takes no argument for the weights' initialisation,
    which a `ConvBlock` gives to its convolutions.
    """

    def __init__(self, out_channels, kernel_size, input_shape, conv_init=None, **options):
        channels = input_shape[-1]
        super().__init__(
            ChannelsLastConv2d(
                channels,
                kernel_size,
                in_channels=channels,
                groups=channels,
                conv_init=conv_init,
                **options,
            ),
            ChannelsLastConv2d(out_channels, 1, in_channels=channels, conv_init=conv_init),
        )

    def apart(self, x):
        """As of `ChannelsLastConv2d`."""
        depthwise, pointwise = self
        return pointwise.apart(depthwise(x))
