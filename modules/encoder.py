"""Conformer and ConMamba encoders: equal layers, and a mixer that is passed in.

Conformer: Gulati et al. 2020, arXiv 2005.08100. ConMamba: Jiang et al. 2024, arXiv 2407.09732.
"""

import torch
from speechbrain import Stage
from torch import nn
from torch.utils.checkpoint import checkpoint

from modules.encoder_layer import EncoderLayer, cut
from modules.initialization import initialize
from modules.lengths import zero_padding
from modules.mamba import Chunk


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
    dropout, mixer_dropout : float
        Of feed-forward and convolution modules, and of what the mixer gives.
    drop_path : float
        Probability of leaving out a branch of the last layer for an utterance; of the layers
        before it, in proportion to their depth.
    mask_padding : bool
        False, for an ablation alone: the layers take the padding of a batch for speech, as the
        published code does, also what CUDA graphs add to it (`modules.graphs`). What is returned
        is masked. Only for whole utterances (ValueError).
    causal : bool
        See only the past; the mixer must be causal too (ValueError).
    chunks : DynChunkTrainConfigRandomSampler or None
        SpeechBrain's draw of the chunk that the mixer, a BiMamba, sees at a time (ValueError for
        another); convolutions are causal. Drawn for each batch in training, in evaluation
        `test_config`. None, or a chunk_size of 0: whole utterances.
    lookahead : int
        Frames after a chunk that the first layer sees too. Those of a further layer would be made
        of the next chunk, and every layer a chunk later than the one before it.
    initialization : str
        "mamba" or "published", see `modules.initialization`.
    gradient_checkpointing : bool
        Recompute each layer in the backward pass: less memory, a third more work. Compiled layers
        recompute in part, see `modules.recomputation`.
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
        chunks=None,
        lookahead=0,
        mixer_dropout=0.0,
        drop_path=0.0,
        mask_padding=True,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        if not mask_padding and (causal or chunks is not None):
            raise ValueError(
                "mask_padding=False is for encoders of whole utterances, not for causal or chunked "
                "ones; use True"
            )
        conv_causal = causal or chunks is not None
        self.input_layer = nn.Sequential(nn.Linear(input_size, d_model), nn.Dropout(dropout))
        self.layers = nn.ModuleList(
            EncoderLayer(
                d_model,
                d_ffn,
                mixer,
                kernel_size,
                activation,
                dropout,
                conv_causal,
                mixer_dropout,
                drop_path * (i + 1) / num_layers,
            )
            for i in range(num_layers)
        )
        name = type(self.layers[0].mixer).__name__
        if causal and not all(layer.mixer.causal for layer in self.layers):
            raise ValueError(
                f"causal=True needs a causal mixer, not {name}; use modules.mamba.Mamba"
            )
        if chunks is not None and not getattr(self.layers[0].mixer, "chunkable", False):
            raise ValueError(f"chunks need the mixer modules.mamba.BiMamba, not {name}")
        check_chunks(chunks, lookahead)
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.causal, self.chunks, self.lookahead = causal, chunks, lookahead
        self.gradient_checkpointing, self.mask_padding = gradient_checkpointing, mask_padding
        initialize(self, initialization)

    @property
    def streams(self):
        """Whether it runs in pieces."""
        return self.causal or self.chunks is not None

    @property
    def chunk_size(self):
        """Frames of a chunk for the next batch, drawn in training; None: all of them."""
        if self.chunks is None:
            return None
        config = self.chunks(Stage.TRAIN if self.training else Stage.TEST)
        return (config and config.chunk_size) or None

    def initial_state(self, batch_size):
        """The layers' state before the first frame; ValueError unless the encoder `streams`."""
        if not self.streams:
            raise ValueError("this encoder needs whole utterances; build it with causal or chunks")
        return [layer.initial_state(batch_size) for layer in self.layers]

    def forward(self, x, lengths, state=None, chunk_size=None, ahead=0, taps=()):
        """Encode.

        x (B, T, input_size), lengths (B,) in frames -> (B, T - ahead, D), lengths; with a state
        also the state after these frames. Frames past a length are zero. A causal or chunked
        encoder takes None for lengths where all frames count.
        chunk_size: in place of the encoder's own.
        ahead: frames at x's end that its last chunk looks at, and that come again.
        taps: numbers of layers, from 1, whose outputs are wanted too, normed as the last one's:
        -> (B, T, D), lengths, [(B, T, D), ...].
        """
        if state is None and chunk_size is None:
            chunk_size = self.chunk_size
        if lengths is not None:
            x = zero_padding(x, lengths)
        x = self.input_layer(x)
        new_state, tapped = [], []
        for i, layer in enumerate(self.layers):
            carried = None if state is None else state[i]
            looks = (0, 0) if i else (self.lookahead, ahead)
            chunk = Chunk(chunk_size, *looks) if chunk_size else None
            spoken = lengths if self.mask_padding else torch.full_like(lengths, x.shape[1])
            if self.gradient_checkpointing and self.training:
                x, carried = checkpoint(layer, x, spoken, carried, chunk, use_reentrant=False)
            else:
                x, carried = layer(x, spoken, carried, chunk)
            if ahead and i == 0:
                x, lengths = cut(x, lengths, x.shape[1])
            new_state.append(carried)
            if i + 1 in taps:
                tapped.append(self._finish(x, lengths))
        x = self._finish(x, lengths)
        if taps:
            return x, lengths, tapped
        return (x, lengths) if state is None else (x, lengths, new_state)

    def _finish(self, x, lengths):
        x = self.norm(x)
        return x if lengths is None else zero_padding(x, lengths)

    def start(self, batch_size, chunk_size=None):
        """The state for `advance`, whose chunks are of `chunk_size` frames (the encoder's own)."""
        size = self.chunk_size if chunk_size is None else chunk_size
        if self.chunks is not None and not size:
            raise ValueError("chunk_size=0 needs whole utterances; give a number of frames")
        held = self.norm.weight.new_zeros(batch_size, 0, self.input_layer[0].in_features)
        return size, held, self.initial_state(batch_size)

    def advance(self, x, state, final=False):
        """The next frames of utterances: x (B, T, input_size), state -> (B, T', D), state.

        Chunks come once their look-ahead is there. final: the utterances end here.
        """
        size, x, layers = state[0], torch.cat([state[1], x], dim=1), state[2]
        if self.chunks is None:
            y, _, layers = self(x, None, layers)
            return y, (size, x[:, :0], layers)
        frames = x.shape[1] if final else max(0, x.shape[1] - self.lookahead) // size * size
        if not frames:
            return x.new_zeros(len(x), 0, *self.norm.normalized_shape), (size, x, layers)
        ahead = min(self.lookahead, x.shape[1] - frames)
        y, _, layers = self(x[:, : frames + ahead], None, layers, size, ahead)
        return y, (size, x[:, frames:].clone(), layers)


def check_chunks(chunks, lookahead):
    """ValueError for numbers of frames that mean nothing."""
    if chunks is None:
        if lookahead:
            raise ValueError(f"lookahead={lookahead} goes with chunks; give these, or 0")
        return
    test_size = (chunks.test_config and chunks.test_config.chunk_size) or 0
    if test_size < 0:
        raise ValueError(f"chunk_size={test_size} must be at least 1 frame, or 0 for all")
    if not 1 <= chunks.chunk_size_min <= chunks.chunk_size_max:
        raise ValueError(
            f"chunk_size_min={chunks.chunk_size_min} must be at least 1 frame and at most "
            f"chunk_size_max={chunks.chunk_size_max}"
        )
    if lookahead < 0:
        raise ValueError(f"lookahead={lookahead} must be at least 0 frames")
