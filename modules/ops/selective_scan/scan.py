"""The selective scan by PyTorch's `scan` operator: a node of exported graphs, ONNX's Scan."""

import torch
from torch._higher_order_ops.scan import scan

from modules.ops.selective_scan.exported import around, availability, supports

__all__ = ["availability", "selective_scan", "supports"]


def selective_scan(*arguments):
    """As `naive.selective_scan`."""
    return around(_recurrence, *arguments)


def _recurrence(dt, dt_u, A, B, C, h):
    def step(h, frame):
        dt, dt_u, B, C = frame
        h = torch.exp(dt.unsqueeze(-1) * A) * h + dt_u.unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1)

    frames = tuple(x.transpose(0, 1) for x in (dt, dt_u, B, C))
    # The operator wants a state that is nobody else's.
    h, y = scan(step, h.clone(), frames, dim=0)
    return y.transpose(0, 1), h
