"""Batches of few shapes, by zeros at their ends: few shapes, few CUDA graphs."""

from torch.nn import functional as F  # noqa: N812

FRAMES, TOKENS = 64, 32  # batches' lengths are padded to multiples of these


def few(shape):
    """The shape with frames added to features (B, T, F), tokens to tokens (B, U), or lengths'."""
    if len(shape) == 1:
        return tuple(shape)
    batch, length, *rest = shape
    return batch, length + -length % (FRAMES if rest else TOKENS), *rest


def padded(x):
    """A tensor of that shape, with zeros at the end."""
    if few(x.shape) == x.shape:
        return x
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, few(x.shape)[1] - x.shape[1]])


def write_padded(targets, inputs):
    """Copy inputs to the beginnings of targets of those shapes, and zeros behind them."""
    for target, x in zip(targets, inputs, strict=True):
        if target.shape == x.shape:
            target.copy_(x)
        else:
            target[:, : x.shape[1]].copy_(x)
            target[:, x.shape[1] :].zero_()
