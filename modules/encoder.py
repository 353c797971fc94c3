"""Conformer and ConMamba encoders: one layer, and a mixer that is passed in.

Conformer: Gulati et al. 2020, arXiv 2005.08100. ConMamba: Jiang et al. 2024, arXiv 2407.09732.
"""

from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from modules.initialization import initialize
from modules.lengths import zero_padding
from modules.ops.causal_conv1d import causal_conv1d
from modules.ops.depthwise_conv1d import depthwise_conv1d


class FeedForward(nn.Sequential):
    """Linear, activation, dropout, linear, dropout: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model, d_ffn, activation, dropout):
        super().__init__(
            nn.Linear(d_model, d_ffn),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(d_ffn, d_model),
            nn.Dropout(dropout),
        )


class ConvModule(nn.Module):
    """The Conformer's convolution module (section 2.2, with LayerNorm for BatchNorm).

    Causal, it sees only the past and carries its last `kernel_size` - 1 inputs as state.
    """

    def __init__(self, d_model, kernel_size, activation, dropout, causal):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd; use {kernel_size + 1}")
        self.causal = causal
        self.norm = nn.LayerNorm(d_model)
        self.pointwise_in = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model)
        self.out_norm = nn.LayerNorm(d_model)
        self.activation = activation()
        self.pointwise_out = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

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
            weight = self.depthwise.weight.squeeze(1)
            x = depthwise_conv1d(x, weight, self.depthwise.bias, lengths)
        x = self.activation(self.out_norm(x))
        return self.dropout(self.pointwise_out(x)), state

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


class EncoderLayer(nn.Module):
    """x + 1/2 FFN; x + mixer; x + conv; x + 1/2 FFN; norm: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model, d_ffn, mixer, kernel_size, activation, dropout, causal):
        super().__init__()
        self.ffn1 = FeedForward(d_model, d_ffn, activation, dropout)
        self.ffn2 = FeedForward(d_model, d_ffn, activation, dropout)
        self.ffn1_norm = nn.LayerNorm(d_model)
        self.ffn2_norm = nn.LayerNorm(d_model)
        self.mixer_norm = nn.LayerNorm(d_model)
        self.mixer = mixer(d_model)
        self.conv = ConvModule(d_model, kernel_size, activation, dropout, causal)
        self.out_norm = nn.LayerNorm(d_model)

    def initial_state(self, batch_size):
        return self.mixer.initial_state(batch_size), self.conv.initial_state(batch_size)

    def forward(self, x, lengths, state=None):
        """x (B, T, D), lengths (B,) -> (B, T, D), state (None when none is given)."""
        mixer_state, conv_state = (None, None) if state is None else state
        x = x + 0.5 * self.ffn1(self.ffn1_norm(x))
        y, mixer_state = self.mixer(self.mixer_norm(x), lengths, mixer_state)
        x = x + y
        y, conv_state = self.conv(x, lengths, conv_state)
        x = x + y
        x = self.out_norm(x + 0.5 * self.ffn2(self.ffn2_norm(x)))
        return x, (None if state is None else (mixer_state, conv_state))


class Encoder(nn.Module):
    """Input layer, `num_layers` equal layers, final norm.

    Arguments
    ---------
    input_size : int
        Channels of the frontend's output.
    d_model, d_ffn, num_layers : int
        Channels, hidden channels of the feed-forward modules, layers.
    mixer : callable
        Makes a mixer from `d_model`: `Mamba`, `BiMamba`, `RelPosAttention`, `RoPEAttention`, with
        their other arguments bound (in YAML: `!name:modules.mamba.BiMamba`).
    kernel_size : int
        Odd width of the depthwise convolution, in frames.
    activation : type
        Activation of feed-forward and convolution modules.
    dropout : float
    causal : bool
        See only the past; the mixer must be causal too (ValueError). A causal encoder runs in
        pieces: pass `initial_state(batch_size)`, then each call's state to the next.
    initialization : str
        "mamba" or "published", see `modules.initialization`.
    gradient_checkpointing : bool
        Recompute each layer in the backward pass: less memory, a third more work.
    """

    def __init__(
        self,
        input_size,
        d_model,
        d_ffn,
        num_layers,
        mixer,
        kernel_size=31,
        activation=nn.GELU,
        dropout=0.1,
        causal=False,
        initialization="mamba",
        gradient_checkpointing=False,
    ):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Linear(input_size, d_model), nn.Dropout(dropout))
        self.layers = nn.ModuleList(
            EncoderLayer(d_model, d_ffn, mixer, kernel_size, activation, dropout, causal)
            for _ in range(num_layers)
        )
        if causal and not all(layer.mixer.causal for layer in self.layers):
            name = type(self.layers[0].mixer).__name__
            raise ValueError(
                f"causal=True needs a causal mixer, not {name}; use modules.mamba.Mamba"
            )
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.causal = causal
        self.gradient_checkpointing = gradient_checkpointing
        initialize(self, initialization)

    def initial_state(self, batch_size):
        """The state before the first frame; ValueError unless the encoder is causal."""
        if not self.causal:
            raise ValueError("only a causal encoder runs in pieces; build it with causal=True")
        return [layer.initial_state(batch_size) for layer in self.layers]

    def forward(self, x, lengths, state=None):
        """Encode.

        x (B, T, input_size), lengths (B,) in frames -> (B, T, D), lengths; with a state also the
        state after these frames. Frames past a length are zero. A causal encoder takes None for
        lengths where all frames count.
        """
        if lengths is not None:
            x = zero_padding(x, lengths)
        x = self.input_layer(x)
        new_state = []
        for i, layer in enumerate(self.layers):
            carried = None if state is None else state[i]
            if self.gradient_checkpointing and self.training:
                x, carried = checkpoint(layer, x, lengths, carried, use_reentrant=False)
            else:
                x, carried = layer(x, lengths, carried)
            new_state.append(carried)
        x = self.norm(x)
        if lengths is not None:
            x = zero_padding(x, lengths)
        return (x, lengths) if state is None else (x, lengths, new_state)
