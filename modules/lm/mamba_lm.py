"""A language model of state-space layers alone: tokens (B, U) -> logits (B, U, V)."""

from torch import nn

from modules.encoder_layer import FeedForward
from modules.initialization import initialize
from modules.mamba import Mamba


class MambaLMLayer(nn.Module):
    """x + dropout(Mamba(LN(x))); x + FFN(LN(x)). Arguments as in `MambaLM`."""

    def __init__(self, d_model, d_ffn, activation, dropout, d_state, expand, d_conv):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.mamba = Mamba(d_model, d_state, expand, d_conv)
        self.dropout = nn.Dropout(dropout)
        self.ffn_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.ffn = FeedForward(d_model, d_ffn, activation, dropout)

    def forward(self, x, state=None):
        """x (B, U, D) -> (B, U, D), the state after it; None without one."""
        y, state = self.mamba(self.norm(x), None, state)
        x = x + self.dropout(y)
        return x + self.ffn(self.ffn_norm(x)), state


class MambaLM(nn.Module):
    """Embedding, layers, norm, head. It needs no positions, and no mask: padding follows.

    A search advances it token by token with a state of constant size.

    Arguments
    ---------
    vocab : int
        Tokens; 0 is padding.
    d_model, d_ffn, num_layers : int
    activation : type
    dropout : float
        On the embedding, after every Mamba and inside the feed-forward parts.
    d_state, expand, d_conv : int
        See `modules.mamba.Mamba`.
    """

    def __init__(
        self,
        vocab,
        d_model=512,
        d_ffn=2048,
        num_layers=12,
        activation=nn.GELU,
        dropout=0.1,
        d_state=16,
        expand=2,
        d_conv=4,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            MambaLMLayer(d_model, d_ffn, activation, dropout, d_state, expand, d_conv)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.head = nn.Linear(d_model, vocab)
        initialize(self, "mamba")

    def start(self, batch_size):
        """The state before the first token."""
        return [layer.mamba.initial_state(batch_size) for layer in self.layers]

    def advance(self, tokens, state):
        """tokens (B, U), state -> logits (B, U, V), state. Constant work a token."""
        states = [None] * len(self.layers) if state is None else state
        x = self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        new_states = []
        for layer, layer_state in zip(self.layers, states, strict=True):
            x, layer_state = layer(x, layer_state)
            new_states.append(layer_state)
        return self.head(self.norm(x)), new_states

    def forward(self, tokens):
        """Whole sequences, right-padded: tokens (B, U) -> logits (B, U, V)."""
        return self.advance(tokens, None)[0]
