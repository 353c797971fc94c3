"""The gated mean in plain PyTorch, on any device."""

from torch.nn import functional as F  # noqa: N812

from modules.ops.backends import OK, Call


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def gated_mean(y, z):
    """As `modules.ops.gating.gated_mean`."""
    return (y.mean(0) * F.silu(z)).to(y.dtype)
