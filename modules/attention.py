"""Attention: the Conformer's two mixers, and the Transformer decoder's layer with its cache."""

import torch
from speechbrain.nnet.attention import RoPEMHA, _get_precomputed_values
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.lengths import valid_frames


def check_heads(d_model, num_heads):
    """Raise ValueError unless the heads divide the model."""
    if d_model % num_heads:
        fitting = [n for n in range(1, 2 * num_heads + 1) if d_model % n == 0]
        raise ValueError(
            f"d_model={d_model} is not divisible by num_heads={num_heads}; use one of {fitting}"
        )


class RelPosAttention(nn.Module):
    """Self-attention with relative positions (Dai et al. 2019, arXiv 1901.02860, section 3.3).

    Weights, their layout, the scale 1 / sqrt(d_model) and the sinusoids of |distance| are those
    of SpeechBrain's `RelPosMHAXL`, so its checkpoints fit; it is written anew because that one
    casts to float32 inside and keeps several (B, H, T, T) tensors where this one keeps one.

    Arguments
    ---------
    d_model, num_heads : int
        Channels and heads; the heads must divide the channels (ValueError).
    dropout : float
        Dropout of the attention weights.
    """

    causal = False

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        check_heads(d_model, num_heads)
        head_dim = d_model // num_heads
        self.num_heads, self.dropout, self.scale = num_heads, dropout, d_model**-0.5
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.linear_pos = nn.Linear(d_model, d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(num_heads, head_dim))
        self.pos_bias_v = nn.Parameter(torch.empty(num_heads, head_dim))
        self.out_proj = nn.Linear(d_model, d_model)
        for weight in (self.in_proj_weight, self.pos_bias_u, self.pos_bias_v):
            nn.init.xavier_uniform_(weight)

    def forward(self, x, lengths, state=None):
        """x (B, T, D), lengths (B,) -> y (B, T, D), None: it attends to the whole utterance."""
        assert state is None, "attention over the whole utterance has no state"
        batch, frames, d_model = x.shape
        heads = (self.num_heads, d_model // self.num_heads)
        # Each head's query, key and value lie side by side in the projection.
        q, k, v = F.linear(x, self.in_proj_weight).view(batch, frames, heads[0], -1).chunk(3, -1)
        positions = sine_encoding(
            torch.arange(frames - 1, -frames, -1, device=x.device).abs(), d_model, x.dtype
        )
        p = self.linear_pos(positions).view(-1, *heads)
        distance = torch.einsum("bihd,jhd->bhij", q + self.pos_bias_v, p) * self.scale
        bias = rel_shift(distance).masked_fill(
            ~valid_frames(lengths, frames)[:, None, None], float("-inf")
        )
        y = F.scaled_dot_product_attention(
            (q + self.pos_bias_u).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias.to(q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


def rel_shift(scores):
    """Move scores over distances T-1 .. -(T-1) to scores over keys.

    (B, H, T, 2 T - 1) -> (B, H, T, T): out[i, j] = scores[i, T - 1 - i + j].
    """
    batch, heads, frames, distances = scores.shape
    shifted = F.pad(scores, (1, 0)).view(batch, heads, distances + 1, frames)[:, :, 1:]
    return shifted.reshape(batch, heads, frames, distances)[..., :frames]


def sine_encoding(positions, d_model, dtype):
    """Sinusoids (Vaswani et al. 2017, section 3.5), sine and cosine interleaved.

    positions (T,) of any size -> (T, D); computed in float32, for there is no length limit to
    table them up to.
    """
    half = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32)
    angles = positions.to(torch.float32).unsqueeze(1) * torch.exp(
        half * (-9.210340371976184 / d_model)
    )
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model].to(dtype)


class RoPEAttention(nn.Module):
    """Self-attention with rotary positions: SpeechBrain's `RoPEMHA`, flash attention on CUDA.

    Arguments as in `RelPosAttention`.
    """

    causal = False

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        check_heads(d_model, num_heads)
        if (d_model // num_heads) % 2:
            raise ValueError(
                f"d_model={d_model} over num_heads={num_heads} gives heads of odd size, which "
                f"cannot be rotated in pairs; make d_model a multiple of {2 * num_heads}"
            )
        self.attention = RoPEMHA(d_model, num_heads, dropout)

    def forward(self, x, lengths, state=None):
        """x (B, T, D), lengths (B,) -> y (B, T, D), None: it attends to the whole utterance."""
        assert state is None, "attention over the whole utterance has no state"
        padded = ~valid_frames(lengths, x.shape[1])
        self._make_tables(x)
        y = self.attention(x, x, x, key_padding_mask=padded, return_attn_weights=False)
        return y, None

    def _make_tables(self, x):
        """Have SpeechBrain make its tables of sines, kept for the process, as ordinary tensors.

        Made in inference mode, they could not be trained with afterwards.
        """
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        with torch.inference_mode(False):
            _get_precomputed_values(x.shape[1], self.attention.head_dim, dtype, x.device)


class CachedAttention(nn.Module):
    """Multi-head attention of the decoder, with `torch.nn.MultiheadAttention`'s weights.

    `project_memory` turns what is attended to into keys and values once; `forward` attends.

    Arguments as in `RelPosAttention`.
    """

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        check_heads(d_model, num_heads)
        self.num_heads, self.dropout = num_heads, dropout
        self.head_dim = d_model // num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def split_heads(self, x, width):
        """x (B, T, n D) -> (B, n H, T, width), each head with zeros up to a width >= D / H."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if width > self.head_dim:
            x = F.pad(x, (0, width - self.head_dim))
        return x.transpose(1, 2)

    def project_memory(self, memory, width=None):
        """memory (B, T, D) -> keys, values (B, H, T, width), by default D / H wide."""
        d_model = memory.shape[-1]
        keys_values = F.linear(memory, self.in_proj_weight[d_model:], self.in_proj_bias[d_model:])
        return self.split_heads(keys_values, width or self.head_dim).chunk(2, dim=1)

    def forward(self, x, keys, values, mask=None, is_causal=False):
        """x (B, U, D), keys and values (B, H, T, width), mask bool (True attends) -> (B, U, D).

        is_causal, in place of a mask: T = U, and nothing attends to what comes after it.
        """
        d_model = x.shape[-1]
        query = F.linear(x, self.in_proj_weight[:d_model], self.in_proj_bias[:d_model])
        y = F.scaled_dot_product_attention(
            self.split_heads(query, keys.shape[-1]),
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
        )
        return self.out_proj(y[..., : self.head_dim].transpose(1, 2).flatten(2))


def fused_width(head_dim, device):
    """How wide heads must be, filled up with zeros, for one kernel to attend: a CUDA device's.

    PyTorch's kernels that take a mask want a multiple of eight in half precision; what they do not
    take runs as products and a softmax in float32.
    """
    return head_dim + (-head_dim % 8 if device.type == "cuda" else 0)
