"""The Conformer's depthwise convolution, centred on each frame: checks and choice of backend."""

import torch

from modules.ops import kernels
from modules.ops.backends import Backends, Call
from modules.ops.depthwise_conv1d import pytorch, triton
from modules.ops.shapes import check_shapes

# In the order in which "auto" tries them. Interpreted, for tests, Triton runs only when asked for.
_backends = Backends(
    "depthwise_conv1d",
    "MAMBA_ASR_DEPTHWISE_BACKEND",
    {**({} if triton.interpreting() else {"triton": triton}), "torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def depthwise_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lengths: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """y_t = bias + sum_k w_k x_{t - (K - 1) / 2 + k} for every channel of a right-padded batch.

    x: (B, T, D); weight: (D, K), K odd; bias: (D,) or None
    lengths: (B,) integers, in frames. From there on x counts as zero, whatever it holds, but the
        result goes on to frame T.
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_DEPTHWISE_BACKEND, then the device.
    -> (B, T, D) in x's dtype, under autocast in autocast's, as PyTorch's own convolutions. The
        weight and the bias are rounded to that dtype first.
    Raises ValueError on arguments that do not fit, UserError on a backend that cannot run.
    """
    _check(x, weight, bias, lengths)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    tensors = (x, weight) if bias is None else (x, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    call = Call(device, x.dtype, weight.shape[1], needs_grad, False, False)
    module = triton if kernels.traced(x) else _backends.pick(backend, call)
    return module.depthwise_conv1d(x, weight, bias, lengths)


def _check(x, weight, bias, lengths):
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (B, T, D) and (D, K)"
        )
    if weight.shape[1] % 2 == 0:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected an odd K to centre it")
    batch, _, channels = x.shape
    expected = {"bias": (bias, (channels,)), "lengths": (lengths, (batch,))}
    check_shapes(expected, x=(x, "(B, T, D)"))
