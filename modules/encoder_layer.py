"""One layer of Conformer and ConMamba encoders, with the mixer that is passed in.

Conformer: Gulati et al. 2020, arXiv 2005.08100. ConMamba: Jiang et al. 2024, arXiv 2407.09732.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.activation import build_activation
from modules.dropout import Dropout
from modules.ops import feed_forward
from modules.ops.causal_conv1d import causal_conv1d
from modules.ops.depthwise_conv1d import depthwise_conv1d
from modules.recomputation import recompute


class FeedForward(nn.Sequential):
    """Linear, activation, dropout, linear, dropout: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model, d_ffn, activation, dropout):
        super().__init__(
            nn.Linear(d_model, d_ffn),
            build_activation(activation),
            Dropout(dropout),
            nn.Linear(d_ffn, d_model),
            Dropout(dropout),
        )


class Depthwise(NamedTuple):
    """What a depthwise convolution multiplies by, as its kernel reads it."""

    weight: torch.Tensor  # (D, K), of which neighbouring channels lie beside each other
    bias: torch.Tensor  # (D,)


class ConvModule(nn.Module):
    """The Conformer's convolution module (section 2.2, with LayerNorm for BatchNorm).

    Causal, it sees only the past and carries its last `kernel_size` - 1 inputs as state.
    """

    derived = None  # `derive` of before, see modules.prepared

    def __init__(self, d_model, kernel_size, activation, dropout, causal):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd; use {kernel_size + 1}")
        self.causal = causal
        self.norm = nn.LayerNorm(d_model)
        self.pointwise_in = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model)
        self.out_norm = nn.LayerNorm(d_model)
        self.activation = build_activation(activation)
        self.pointwise_out = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def initial_state(self, batch_size):
        """Zero inputs (B, D, kernel_size - 1) before the first frame."""
        d_model, _, width = self.depthwise.weight.shape
        return self.depthwise.weight.new_zeros(batch_size, d_model, width - 1)

    def forward(self, x, lengths, state=None):
        """x (B, T, D), lengths (B,) -> (B, T, D), state."""
        x = F.glu(self.pointwise_in(self.norm(x)), dim=-1)
        if self.causal:
            x, state = self._causal(x, lengths, state)
        else:
            plain = self.depthwise.weight.squeeze(1), self.depthwise.bias
            x = depthwise_conv1d(x, *(self.derived or plain), lengths)
        x = self.activation(self.out_norm(x))
        return self.dropout(self.pointwise_out(x)), state

    def derive(self):
        """-> Depthwise"""
        weight, bias = self.depthwise.weight.squeeze(1), self.depthwise.bias
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight, bias = (x.to(torch.get_autocast_dtype(device)) for x in (weight, bias))
        return Depthwise(weight.t().contiguous().t(), bias)

    def _causal(self, x, lengths, state):
        keep = state is not None
        x = causal_conv1d(
            x,
            self.depthwise.weight.squeeze(1),
            self.depthwise.bias,
            lengths=lengths,
            initial_state=state,
            return_state=keep,
        )
        return x if keep else (x, None)


class DropPath(nn.Module):
    """Leave a branch out for some utterances of a batch in training (Huang et al. 2016).

    Where it stays it is scaled up, so that its mean is what it is in evaluation.
    """

    def __init__(self, probability):
        super().__init__()
        # No number, for which torch.compile would compile every layer anew.
        self.register_buffer("probability", torch.tensor(probability), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


class EncoderLayer(nn.Module):
    """x + 1/2 FFN; x + mixer; x + conv; x + 1/2 FFN; norm: (B, T, D) -> (B, T, D).

    Set `recomputes` before it is compiled, to have it keep less in training.
    """

    recomputes = False

    def __init__(
        self,
        d_model,
        d_ffn,
        mixer,
        kernel_size,
        activation,
        dropout,
        causal,
        mixer_dropout=0.0,
        drop_path=0.0,
    ):
        super().__init__()
        self.ffn1 = FeedForward(d_model, d_ffn, activation, dropout)
        self.ffn2 = FeedForward(d_model, d_ffn, activation, dropout)
        self.ffn1_norm = nn.LayerNorm(d_model)
        self.ffn2_norm = nn.LayerNorm(d_model)
        self.mixer_norm = nn.LayerNorm(d_model)
        self.mixer = mixer(d_model)
        self.conv = ConvModule(d_model, kernel_size, activation, dropout, causal)
        self.out_norm = nn.LayerNorm(d_model)
        self.mixer_dropout = Dropout(mixer_dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def initial_state(self, batch_size):
        return self.mixer.initial_state(batch_size), self.conv.initial_state(batch_size)

    def forward(self, x, lengths, state=None, chunk=None):
        """x (B, T, D), lengths (B,) -> (B, T, D), state (None when none is given).

        chunk: for the mixer; the `chunk.ahead` frames at x's end are not returned.
        """
        if self.recomputes and self.training:
            return recompute(self._forward, x, lengths, state, chunk)
        return self._forward(x, lengths, state, chunk)

    def _forward(self, x, lengths, state, chunk):
        mixer_state, conv_state = (None, None) if state is None else state
        drop = self.drop_path
        x = self._half_step(x, self.ffn1_norm, self.ffn1)
        options = {} if chunk is None else {"chunk": chunk}
        y, mixer_state = self.mixer(self.mixer_norm(x), lengths, mixer_state, **options)
        if y.shape[1] < x.shape[1]:
            x, lengths = cut(x, lengths, y.shape[1])
        x = x + drop(self.mixer_dropout(y))
        y, conv_state = self.conv(x, lengths, conv_state)
        x = x + drop(y)
        x = self._half_step(x, self.ffn2_norm, self.ffn2, self.out_norm)
        return x, (None if state is None else (mixer_state, conv_state))

    def _half_step(self, x, norm, ffn, closing=None):
        """x + 1/2 FFN, then the closing norm: x (B, T, D) -> (B, T, D)."""
        first, activation, _, second, _ = ffn
        if not self.training and feed_forward.supports(x, first, activation):
            return feed_forward.residual_feed_forward(x, norm, first, second, closing, scale=0.5)
        x = x + 0.5 * self.drop_path(ffn(norm(x)))
        return x if closing is None else closing(x)


def cut(x, lengths, frames):
    """The first frames: x (B, T, D), lengths (B,) or None -> (B, frames, D), lengths."""
    return x[:, :frames], None if lengths is None else lengths.clamp(max=frames)
