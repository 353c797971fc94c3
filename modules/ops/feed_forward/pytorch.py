"""The feed-forward branch in plain PyTorch, on any device: what the kernel must equal."""

from torch.nn import functional as F  # noqa: N812


def residual_feed_forward(x, norm, first, second, closing=None, *, scale):
    """As `modules.ops.feed_forward.residual_feed_forward`."""
    y = x + scale * second(F.gelu(first(norm(x))))
    return y if closing is None else closing(y)
