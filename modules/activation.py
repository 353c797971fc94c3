"""GELU that costs compiled code little: a polynomial and an exponential in place of erf."""

import torch
from torch import nn


class GELU(nn.GELU):
    """PyTorch's, which in compiled code on a GPU is `ShortGELU` in half precision.

    CUDA's erf has two branches, and an Inductor kernel takes both: 19 instructions an element more
    than here, and 24 backward. With dropout beside it, it waited for them and not for memory.
    """

    def forward(self, x):
        """x of any shape -> the same shape."""
        # In float32 `float` returns x itself, and Dynamo (2.11) then loses the gradient.
        half = x.dtype in (torch.bfloat16, torch.float16)
        short = half and x.is_cuda and torch.compiler.is_compiling()
        return ShortGELU.apply(x) if short else super().forward(x)


class ShortGELU(torch.autograd.Function):
    """x Phi(x), in float32 within 2.5e-7 (of x beyond 1), and its slope; keeps x alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        z = x.float()
        a = z.abs()
        return (0.5 * z + a * (0.5 - tail(a))).to(x.dtype)  # infinite and NaN where PyTorch's is

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        z = x.float()
        a = z.abs()
        density = torch.exp2(-0.7213475204 * (z * z) - 1.3257480647)  # exp(-z²/2) / sqrt(2 pi)
        slope = 0.5 + torch.copysign(0.5 - (tail(a) - a * density), z)  # less 1/2 it is odd
        return (gradient.float() * slope).to(x.dtype)


def tail(a):
    """1 - Phi(a) of a >= 0: how much of the normal distribution lies beyond."""
    return torch.exp2(tail_power(a))


def tail_power(a):
    """log2(tail(a)), a polynomial; arithmetic alone, which Triton too compiles as it stands.

    Minimax, weighted by what an error does to GELU and to its slope, which is less than 2e-8. The
    coefficients stand here, as torch.compile(dynamic=True) takes a module's floats for inputs.
    """
    power = -2.3349482e-06 * a + 3.3737804e-05
    power = power * a - 0.00016129378
    power = power * a - 0.0001917037
    power = power * a + 0.0071268654
    power = power * a - 0.05253361
    power = power * a - 0.4591983
    power = power * a - 1.151106
    return power * a - 1


def build_activation(factory):
    """What a class or factory makes; for PyTorch's GELU the one here."""
    layer = factory()
    exact = type(layer) is nn.GELU and layer.approximate == "none"
    return GELU() if exact else layer
