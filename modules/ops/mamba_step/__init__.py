"""One frame of a Mamba layer with its state, for searches: no loop, no lengths, no padding."""

import torch

from modules.ops.backends import Backends, Call
from modules.ops.mamba_step import pytorch, triton

# In the order in which "auto" tries them. Interpreted, for tests, Triton runs only when asked for.
_backends = Backends(
    "mamba_step",
    "MAMBA_ASR_STEP_BACKEND",
    {**({} if triton.interpreting() else {"triton": triton}), "torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def conv_step(x, weight, bias, state, backend="auto"):
    """silu(bias + sum_k w_k x_k) over the K - 1 inputs of the state, oldest first, and x.

    x (B, D), weight (D, K), bias (D,), state (B, D, K - 1) -> (B, D), state; both in x's dtype.
    """
    run = _pick(backend, x, weight.shape[1], x, weight, bias, state)
    return run.conv_step(x, weight, bias, state)


def scan_step(x, dt, A_log, B, C, D, z, dt_bias, h, backend="auto"):
    """h' = exp(dt A) h + dt B x, y = (C h' + D x) silu(z); dt = softplus(dt + dt_bias).

    x, dt, z (B, D), z may be None; A_log (D, N), A = -exp(A_log); B, C (B, N); D, dt_bias (D,);
    h (B, D, N) -> y (B, D) in x's dtype, h in float32 (float64 if x is).
    """
    run = _pick(backend, x, A_log.shape[1], x, dt, A_log, B, C, D, z, dt_bias, h)
    return run.scan_step(x, dt, A_log, B, C, D, z, dt_bias, h)


def _pick(backend, x, width, *tensors):
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _backends.pick(backend, Call(x.device.type, x.dtype, width, grad, True, True))
