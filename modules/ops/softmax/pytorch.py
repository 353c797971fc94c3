"""In plain PyTorch, some utterances after the other: float32 copies of all would be large."""

import torch

from modules.ops.backends import OK, Call


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def normalizers(logits):
    """As `modules.ops.softmax.normalizers`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = logits.split(utterances_at_once(logits))
    return torch.cat([x.to(dtype).logsumexp(dim=2) for x in parts])


def scaled_softmax(logits, normalizers, factors):
    """As `modules.ops.softmax.scaled_softmax`."""
    out, n = torch.empty_like(logits), utterances_at_once(logits)
    parts = (x.split(n) for x in (logits, factors.unsqueeze(2), out))
    for x, factor, y in zip(*parts, strict=True):
        torch.mul(x.softmax(dim=2, dtype=normalizers.dtype), factor, out=y)
    # Not multiplied by zero, which NaN would survive.
    return out.masked_fill_((factors == 0).unsqueeze(2), 0.0)


def utterances_at_once(logits):
    """How many utterances of (B, T, V) take about 32 MB in float32."""
    _, T, V = logits.shape
    return max(1, 2**23 // max(1, T * V))
