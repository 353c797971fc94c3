"""PyTorch's CTC, on CPUs and CUDA devices. There the host waits for the device in each call.

Softmax is taken of some utterances after the other: float32 copies of all would be large.
"""

import torch
from torch.nn import functional as F  # noqa: N812

from modules.ops.backends import OK, Call


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def ctc(scores, labels, lengths, label_lengths, blank, needs_grad):
    """As `modules.ops.ctc.ctc`."""
    with torch.set_grad_enabled(needs_grad):
        scores = scores.detach().requires_grad_(needs_grad)
        loss = F.ctc_loss(
            scores.transpose(0, 1), labels, lengths, label_lengths, blank, reduction="none"
        )
    if not needs_grad:
        return loss, None
    # PyTorch's is with respect to the logits already.
    (grad,) = torch.autograd.grad(loss, scores, torch.ones_like(loss))
    return loss.detach(), grad


def normalizers(logits):
    """As `modules.ops.ctc.normalizers`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = logits.split(utterances_at_once(logits))
    return torch.cat([x.to(dtype).logsumexp(dim=2) for x in parts])


def scaled_softmax(logits, normalizers, factors, columns, values):
    """As `modules.ops.ctc.scaled_softmax`."""
    out, n = torch.empty_like(logits), utterances_at_once(logits)
    parts = (x.split(n) for x in (logits, factors.unsqueeze(2), out))
    for x, factor, y in zip(*parts, strict=True):
        torch.mul(x.softmax(dim=2, dtype=normalizers.dtype), factor, out=y)
    index = columns.unsqueeze(1).expand_as(values)
    out.scatter_(2, index, (values * factors.unsqueeze(2)).to(out.dtype))
    # Not multiplied by zero, which NaN would survive.
    return out.masked_fill_((factors == 0).unsqueeze(2), 0.0)


def utterances_at_once(logits):
    """How many utterances of (B, T, V) take about 32 MB in float32."""
    _, T, V = logits.shape
    return max(1, 2**23 // max(1, T * V))
