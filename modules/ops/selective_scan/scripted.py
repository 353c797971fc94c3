"""The selective scan as a loop that TorchScript keeps a loop, also in a traced model."""

import functools

import torch

from modules.ops.selective_scan.exported import around, availability, supports

__all__ = ["availability", "selective_scan", "supports"]


def selective_scan(*arguments):
    """As `naive.selective_scan`."""
    return around(_recurrence(), *arguments)


def _loop(
    dt: torch.Tensor,
    dt_u: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(dt)
    for t in range(dt.shape[1]):
        h = torch.exp(dt[:, t].unsqueeze(-1) * A) * h
        h = h + dt_u[:, t].unsqueeze(-1) * B[:, t].unsqueeze(1)
        y[:, t] = (h * C[:, t].unsqueeze(1)).sum(-1)
    return y, h


@functools.cache
def _recurrence():
    """The loop, compiled when first needed: importing this package compiles nothing."""
    return torch.jit.script(_loop)
