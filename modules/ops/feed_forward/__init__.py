"""A layer's feed-forward branch in inference: norm, two products around GELU, and the residual."""

import torch

from modules.activation import GELU
from modules.ops import kernels
from modules.ops.feed_forward import triton

HALF = torch.bfloat16, torch.float16


def supports(x, first, activation):
    """Whether the kernel does it for x (B, T, D): compiled, under autocast, without gradients.

    first: the module's nn.Linear(D, hidden); activation: the nn.Module behind it
    """
    if not kernels.traced(x) or torch.is_grad_enabled():
        return False
    device, exact = x.device.type, type(activation) is GELU and activation.approximate == "none"
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) in HALF
    sizes = first.in_features, first.out_features
    return exact and half and x.dtype in (torch.float32, *HALF) and triton.fits(*sizes, x.is_cuda)


def residual_feed_forward(x, norm, first, second, closing=None, *, scale):
    """x + scale second(gelu(first(norm(x)))), then the closing norm, if any; under autocast.

    x: (B, T, D); norm, closing: nn.LayerNorm(D); first, second: nn.Linear, hidden from and to D
    -> (B, T, D) in float32, but in x's dtype where that is autocast's and nothing closes
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    products = [t.to(dtype) for t in (first.weight, first.bias, second.weight, second.bias)]
    closes = () if closing is None else (closing.weight, closing.bias)
    eps = (norm.eps, 0.0 if closing is None else closing.eps)
    return triton.operator(x, [norm.weight, norm.bias, *products, *closes], *eps, scale)
