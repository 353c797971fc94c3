"""Convolutional subsampling: features (B, T, n_mels) -> (B, about T / 4, channels * n_mels / 4).

Or by 8, with three blocks.
"""

import torch
from speechbrain.lobes.models.convolution import ConvBlock
from speechbrain.nnet.normalization import LayerNorm
from torch import nn

from modules.convolutions import ChannelsLastConv2d, SeparableConv2d
from modules.lengths import zero_padding
from modules.ops import norm_act_pad


class ConvFrontend(nn.Module):
    """SpeechBrain's `ConvolutionFrontEnd`, one layer a block, that knows where an utterance ends.

    SpeechBrain pads every convolution by reflection at the edges of the *tensor*, so the last
    frames of an utterance depend on what else is in its batch. Here each utterance is reflected
    at its own end; alone, the result is SpeechBrain's to the bit.

    Arguments
    ---------
    n_mels : int
        Feature channels.
    channels : list of int
        Output channels of each block.
    kernel_size : int
        Odd width of every kernel, in frames and in frequency bins (ValueError).
    stride : int
        Stride of every block, in time and in frequency.
    dropout : float
        Dropout after every block.
    separable : bool
        Depthwise-separable convolutions after the first block, as FastConformer's subsampling by
        8 in three blocks (Rekesh et al. 2023, arXiv 2305.05084).
    """

    def __init__(
        self,
        n_mels=80,
        channels=(64, 32),
        kernel_size=3,
        stride=2,
        dropout=0.15,
        separable=False,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd; use {kernel_size + 1}")
        if not channels:
            raise ValueError("channels must list a number for each block, such as [64, 32]")
        self.stride = stride
        self.reach = kernel_size // 2
        # Named as in SpeechBrain's `ConvolutionFrontEnd`, so its weights fit.
        self.blocks = nn.ModuleDict()
        shape = (n_mels,)
        self.shapes = [shape]  # of a frame before each block, and after the last
        for i, out_channels in enumerate(channels):
            self.blocks[f"convblock_{i}"] = ConvBlock(
                num_layers=1,
                out_channels=out_channels,
                # `forward` reflects both edges of the bins before the block.
                input_shape=(None, None, shape[0] + 2 * self.reach, *shape[1:]),
                kernel_size=kernel_size,
                stride=stride,
                conv_module=SeparableConv2d if separable and i else ChannelsLastConv2d,
                norm=LayerNorm,
                dropout=dropout,
                padding="valid",
            )
            shape = ((shape[0] - 1) // stride + 1, out_channels)
            self.shapes.append(shape)

    def forward(self, x, lengths):
        """Subsample.

        x (B, T, n_mels), lengths (B,) in frames -> (B, T', F'), (B,), with T' and the lengths
        divided by the stride, rounded up, once per block. Frames past a length are zero.
        """
        fewest_bins = self.shapes[-2][0]  # that are reflected
        if fewest_bins > self.reach and norm_act_pad.supports(x.unsqueeze(-1), self.reach):
            return self.fused(x, lengths)
        # Nothing valid reads the padding, but the weights' gradient does: 0 x NaN is NaN.
        x = zero_padding(x, lengths)
        for block in self.blocks.values():
            x = block(reflect_bins(reflect_frames(x, lengths, self.reach), self.reach))
            if torch.is_autocast_enabled(x.device.type):
                # What comes next does so after copying twice as much.
                x = x.to(torch.get_autocast_dtype(x.device.type))
            lengths = (lengths - 1) // self.stride + 1
        return zero_padding(x.flatten(2), lengths), lengths

    def fused(self, x, lengths):
        """`forward` with one kernel from conv to conv, and one for what the first conv reads."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        first = self.blocks["convblock_0"].convs.conv_0
        if torch.is_grad_enabled() and x.requires_grad:
            x = zero_padding(x, lengths).to(dtype)
            y = first(reflect_bins(reflect_frames(x, lengths, self.reach), self.reach))
        else:
            size = first.conv.weight.shape[:1:-1]  # frames and bins
            y = first.product(
                norm_act_pad.patches(
                    x, lengths, size, self.stride, self.reach, first.columns, dtype
                )
            )
        offset = None  # the first has its bias
        for i, block in enumerate(self.blocks.values(), start=1):
            parts = block.convs
            if i > 1:
                y, offset = parts.conv_0.apart(x)
            lengths = (lengths - 1) // self.stride + 1
            x = norm_act_pad.norm_act_pad(
                y,
                parts.norm_0.norm.weight,
                parts.norm_0.norm.bias,
                lengths,
                eps=parts.norm_0.norm.eps,
                slope=parts.act_0.negative_slope,
                dropout=parts.dropout_0.p if self.training else 0.0,
                reach=self.reach if i < len(self.blocks) else 0,
                offset=offset,
            )
        return x.flatten(2), lengths

    def initial_step(self, batch_size):
        """The state of `step` before the first frame: zeros, none of which is read."""
        new = next(self.parameters()).new_zeros
        held = [new(batch_size, self.reach, *shape) for shape in self.shapes[:-1]]
        return held, new(batch_size, dtype=torch.long)

    def step(self, x, lengths, state, ahead=0):
        """`advance` with tensors of constant size, for graphs that hold for every step.

        x (B, T, n_mels), T a multiple of `subsampling`; lengths (B,): fewer than T where an
        utterance ends; state: of each block the `reach` frames before x, and (B,) whether
        there are any; ahead: frames at x's end, a multiple of `subsampling`, that come again
        -> (B, T / subsampling, F'), lengths, the state before the frames that come again.
        """
        held, begun = state
        alive = lengths > 0
        new_held = []
        for block, before in zip(self.blocks.values(), held, strict=True):
            x = reflect_frames(x, lengths, self.reach, before, begun)
            batch = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
            reach = torch.arange(self.reach, device=x.device)
            kept = lengths.clamp(max=x.shape[1] - 2 * self.reach - ahead) if ahead else lengths
            new_held.append(x[batch, kept.unsqueeze(1) + reach])
            x = block(reflect_bins(x, self.reach))
            lengths, ahead = (lengths - 1) // self.stride + 1, ahead // self.stride
        return (
            zero_padding(x.flatten(2), lengths),
            lengths,
            (new_held, torch.maximum(begun, alive.long())),
        )

    @property
    def output_size(self):
        """F', channels of a frame of the result."""
        bins, channels = self.shapes[-1]
        return bins * channels

    @property
    def subsampling(self):
        """Feature frames a frame of the result."""
        return self.stride ** len(self.blocks)

    @property
    def lookahead(self):
        """Feature frames that a frame of the result reads after its own time."""
        return sum(self.reach * self.stride**i for i in range(len(self.blocks)))

    def initial_state(self, batch_size):
        """The state before the first frame, a pair a block.

        The frames (B, n, ...) that the block still reads, and whether they follow its first ones.
        """
        zeros = next(self.parameters()).new_zeros
        return [(zeros(batch_size, 0, *shape), False) for shape in self.shapes[:-1]]

    def advance(self, x, state, final=False):
        """The next frames of utterances: x (B, T, n_mels), state -> (B, T', F'), state.

        Frames come once all that they read are there. final: the utterances end here.
        """
        new_state = []
        for i, (block, (held, begun)) in enumerate(zip(self.blocks.values(), state, strict=True)):
            x = torch.cat([held, x], dim=1)
            if not begun and not final and x.shape[1] <= self.reach:  # too few to reflect
                new_state.append((x, False))
                x = x.new_zeros(len(x), 0, *self.shapes[i + 1])
                continue
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
            x = reflect_frames(x, lengths, self.reach)
            x = x[:, self.reach if begun else 0 : None if final else x.shape[1] - self.reach]
            frames = max(0, (x.shape[1] - 2 * self.reach - 1) // self.stride + 1)
            new_state.append((x[:, frames * self.stride :].clone(), True))
            if frames:
                x = x[:, : (frames - 1) * self.stride + 2 * self.reach + 1]
                x = block(reflect_bins(x, self.reach))
            else:
                x = x.new_zeros(len(x), 0, *self.shapes[i + 1])
        return x.flatten(2), new_state


def reflect_frames(x, lengths, reach, held=None, begun=None):
    """Reflect every utterance at its own ends: (B, T, ...) -> (B, T + 2 reach, ...).

    An utterance too short to reflect repeats its nearest frame instead.
    held (B, reach, ...): the frames before x of utterances that have begun (B,), 1 or 0.
    """
    batch = torch.arange(x.shape[0], device=x.device)
    last = (lengths - 1).clamp(min=0)
    before = torch.stack([x[batch, last.clamp(max=i)] for i in range(reach, 0, -1)], dim=1)
    first = torch.full_like(last, reach)  # of an utterance, in what is made here
    if held is not None:
        before = torch.where(begun.view(-1, *[1] * (x.dim() - 1)) > 0, held, before)
        first = first * (1 - begun)
    room = x.new_zeros(x.shape[0], reach, *x.shape[2:])
    x = torch.cat([before, x, room], dim=1)
    for i in range(reach):
        x[batch, lengths + reach + i] = x[batch, torch.maximum(reach + last - 1 - i, first)]
    return x


def reflect_bins(x, reach):
    """Reflect the frequency axis: (B, T, F, ...) -> (B, T, F + 2 reach, ...).

    Too few bins to reflect repeat the outermost that there is, as frames do.
    """
    last = x.shape[2] - 1
    low = [min(i, last) for i in range(reach, 0, -1)]
    high = [max(last - i, 0) for i in range(1, reach + 1)]
    low, high = ([x[:, :, i : i + 1] for i in bins] for bins in (low, high))
    return torch.cat([*low, x, *high], dim=2)
