"""PyTorch's CTC, on CPUs and CUDA devices. There the host waits for the device in each call."""

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
