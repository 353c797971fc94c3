"""Heads over a large vocabulary: the bias's gradient comes with the weight's, of one product.

By itself it is a sum over the gradient of all logits, 128 MB of 32 x 16 s and 5,000 tokens.
"""

from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812


def learn_biases_by_products(modules):
    """Let the heads of a brain's modules learn that way, on CUDA devices and in half precision.

    Elsewhere, and without gradients, they stay as they are; so do their weights and the names.
    """
    for name, head in modules.items():
        if name.endswith("_head") and type(head) is nn.Linear:
            head.forward = partial(linear, head)


def linear(head, x):
    """A head's logits: x (..., D) -> (..., V)"""
    if not supports(head, x):
        return F.linear(x, head.weight, head.bias)
    return BiasByProduct.apply(x, head.weight, head.bias, _dtype(x))


def supports(head, x):
    """Whether the bias is learnt by a product. Of float32 that would add roundings to TF32."""
    learns = head.bias is not None and head.bias.requires_grad and head.weight.requires_grad
    half = _dtype(x) in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and learns and torch.is_grad_enabled()


class BiasByProduct(torch.autograd.Function):
    """A linear layer in another dtype, as under autocast; x has columns of ones in the product."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        channels = x.shape[-1]
        # Tensor cores want whole eights.
        ones = x.new_ones(x.shape[:-1].numel(), channels // 8 * 8 + 8, dtype=dtype)
        rows = ones[:, :channels].copy_(x.reshape(-1, channels))
        weight = weight.to(dtype)
        ctx.save_for_backward(ones, weight)
        return F.linear(rows, weight, bias.to(dtype)).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        ones, weight = ctx.saved_tensors
        vocabulary, channels = weight.shape
        rows = dy.reshape(-1, vocabulary)
        both = rows.t() @ ones
        dx = (rows @ weight).view(*dy.shape[:-1], channels) if ctx.needs_input_grad[0] else None
        return dx, both[:, :channels], both[:, channels], None


def _dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
