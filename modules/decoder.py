"""Attention and state-space decoders: tokens (B, U) and memory (B, T, D) -> (B, U, D).

A decoder reads the memory once (`start`), then advances token by token or all at once with the
same code (`advance`); training, a layer's `forward`, and search differ only in how many tokens they
pass.
"""

import torch
from torch import nn

from modules.attention import CachedAttention, fused_width, sine_encoding
from modules.dropout import Dropout
from modules.encoder_layer import FeedForward
from modules.handing_out import add_up, hand_out
from modules.initialization import initialize
from modules.lengths import valid_frames, zero_padding
from modules.mamba import Mamba


class MambaDecoderLayer(nn.Module):
    """x + Mamba(LN(x)); x + Mamba([memory; LN(x)]) at the tokens; x + FFN(LN(x)).

    Arguments
    ---------
    d_model, d_ffn : int
    activation : type
    dropout : float
        Inside the feed-forward module.
    d_state, expand, d_conv : int
        See `Mamba`.
    """

    def __init__(
        self, d_model, d_ffn, activation=nn.GELU, dropout=0.1, d_state=16, expand=2, d_conv=4
    ):
        super().__init__()
        self.self_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.self_mamba = Mamba(d_model, d_state, expand, d_conv)
        self.cross_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.cross_mamba = Mamba(d_model, d_state, expand, d_conv)
        self.ffn_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.ffn = FeedForward(d_model, d_ffn, activation, dropout)

    def forward(self, x, lengths, memory, memory_lengths):
        """x (B, U, D), lengths (B,), memory (B, T, D), memory_lengths (B,) -> (B, U, D)."""
        return self.advance(x, lengths, self.start(memory, memory_lengths))[0]

    def start(self, memory, lengths):
        """Read each utterance's memory up to its own length: the state before the first token."""
        batch_size = memory.shape[0]
        _, cross_state = self.cross_mamba(
            memory, lengths, self.cross_mamba.initial_state(batch_size)
        )
        return self.self_mamba.initial_state(batch_size), cross_state

    def advance(self, x, lengths, state):
        """x (B, U, D), lengths (B,) or None, state -> (B, U, D), state. Constant work a token."""
        self_state, cross_state = state
        y, self_state = self.self_mamba(self.self_norm(x), lengths, self_state)
        x = x + y
        y, cross_state = self.cross_mamba(self.cross_norm(x), lengths, cross_state)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), (self_state, cross_state)


class TransformerDecoderLayer(nn.Module):
    """Pre-norm Transformer decoder layer (Vaswani et al. 2017) with a key and value cache.

    Arguments
    ---------
    d_model, d_ffn, num_heads : int
    activation : type
    dropout : float
        On the attention weights, inside the feed-forward module and on every residual branch.
    """

    def __init__(self, d_model, d_ffn, num_heads, activation=nn.GELU, dropout=0.1):
        super().__init__()
        self.self_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.self_attention = CachedAttention(d_model, num_heads, dropout)
        self.cross_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.cross_attention = CachedAttention(d_model, num_heads, dropout)
        self.ffn_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.ffn = FeedForward(d_model, d_ffn, activation, dropout)
        self.self_dropout, self.cross_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, x, lengths, memory, memory_lengths):
        """x (B, U, D), lengths (B,), memory (B, T, D), memory_lengths (B,) -> (B, U, D)."""
        # Not in a search, where keys are of another number every token: cuDNN plans for each anew.
        width = fused_width(self.cross_attention.head_dim, memory.device)
        return self.advance(x, lengths, self.start(memory, memory_lengths, width))[0]

    def start(self, memory, lengths, width=None):
        """Project the memory once and begin with an empty cache of tokens.

        width: of the heads in both, see `CachedAttention`.
        """
        keys, values = self.cross_attention.project_memory(memory, width)
        mask = valid_frames(lengths, memory.shape[1])[:, None, None]
        return keys[:, :, :0], values[:, :, :0], keys, values, mask

    def advance(self, x, lengths, state):
        """x (B, U, D), state -> (B, U, D), state. Padded tokens follow all valid ones."""
        past_keys, past_values, keys, values, mask = state
        y = self.self_norm(x)
        new_keys, new_values = self.self_attention.project_memory(y, keys.shape[-1])
        past, causal = past_keys.shape[2], None
        if past:
            new_keys = torch.cat([past_keys, new_keys], dim=2)
            new_values = torch.cat([past_values, new_values], dim=2)
            causal = torch.ones(x.shape[1], new_keys.shape[2], dtype=torch.bool, device=x.device)
            causal = causal.tril(past)
        y = self.self_attention(y, new_keys, new_values, causal, is_causal=not past)
        x = x + self.self_dropout(y)
        x = x + self.cross_dropout(self.cross_attention(self.cross_norm(x), keys, values, mask))
        x = x + self.ffn(self.ffn_norm(x))
        return x, (new_keys, new_values, keys, values, mask)


class Decoder(nn.Module):
    """Token embedding with sine positions, layers, final norm.

    Arguments
    ---------
    vocab_size, d_model, d_ffn, num_layers : int
    layer : callable
        Makes a layer from `d_model` and `d_ffn`: `TransformerDecoderLayer` or `MambaDecoderLayer`
        with their other arguments bound. It uses the memory in matrix products alone.
    initialization : str
        "mamba" or "published", see `modules.initialization`.
    padding_index : int
        The token whose embedding is zero.
    """

    add_up = staticmethod(add_up)  # the layers' gradients of the memory; may be compiled

    def __init__(
        self, vocab_size, d_model, d_ffn, num_layers, layer, initialization="mamba", padding_index=0
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model, padding_idx=padding_index)
        self.layers = nn.ModuleList(layer(d_model, d_ffn) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        initialize(self, initialization)
        with torch.no_grad():
            self.embedding.weight[padding_index].zero_()

    def start(self, memory, lengths):
        """Read the memory (B, T, D), valid to lengths (B,): the state before the first token."""
        memory = zero_padding(memory, lengths)
        position = torch.zeros((), dtype=torch.long, device=memory.device)
        return position, [layer.start(memory, lengths) for layer in self.layers]

    def advance(self, tokens, state, lengths=None):
        """Decode more tokens.

        tokens (B, U) int, state from `start` or an earlier call, lengths (B,) of tokens when they
        are padded -> (B, U, D), state. Nothing here waits for the device.
        """
        position, layer_states = state
        x = self.embed(tokens, position)
        new_states = []
        for layer, layer_state in zip(self.layers, layer_states, strict=True):
            x, layer_state = layer.advance(x, lengths, layer_state)
            new_states.append(layer_state)
        return self.norm(x), (position + tokens.shape[1], new_states)

    def forward(self, tokens, lengths, memory, memory_lengths):
        """Teacher forcing.

        tokens (B, U), lengths (B,), memory (B, T, D), memory_lengths (B,) -> (B, U, D), lengths.
        Tokens past a length are zero.
        """
        memory = zero_padding(memory, memory_lengths)
        memories = hand_out(memory, len(self.layers), self.add_up)
        x = self.embed(tokens)
        for layer, memory in zip(self.layers, memories, strict=True):
            x = layer(x, lengths, memory, memory_lengths)
        return zero_padding(self.norm(x), lengths), lengths

    def embed(self, tokens, position=0):
        """Tokens (B, U), the first at a position -> (B, U, D)."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        positions = position + torch.arange(tokens.shape[1], device=tokens.device)
        return x + sine_encoding(positions, x.shape[-1], x.dtype)


def select_hypotheses(state, index):
    """Reorder or repeat the batch axis of every tensor in a decoder state: index (B',) -> B'.

    The position, a tensor without axes, is common to all.
    """
    if isinstance(state, torch.Tensor):
        return state.index_select(0, index) if state.dim() else state
    if isinstance(state, tuple | list):
        return type(state)(select_hypotheses(part, index) for part in state)
    return state
