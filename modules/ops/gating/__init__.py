"""What closes a BiMamba layer: the mean of both directions' scans, gated."""

import torch

from modules.ops import kernels
from modules.ops.backends import Backends, Call
from modules.ops.gating import pytorch, triton

# In the order in which "auto" tries them. Interpreted, for tests, Triton runs only when asked for.
_backends = Backends(
    "gated_mean",
    "MAMBA_ASR_GATE_BACKEND",
    {**({} if triton.interpreting() else {"triton": triton}), "torch": pytorch, "triton": triton},
    reference=None,
)
available_backends = _backends.available


def gated_mean(y: torch.Tensor, z: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """1/2 (y_0 + y_1) silu(z)

    y: (2, B, T, D); z: (B, T, D) -> (B, T, D) in y's dtype
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_GATE_BACKEND, then the device.
    Raises ValueError on shapes that do not fit, UserError on a backend that cannot run.
    """
    if z.dim() != 3 or y.shape != (2, *z.shape):
        raise ValueError(
            f"y is {tuple(y.shape)} and z {tuple(z.shape)}; expected (2, B, T, D) and (B, T, D)"
        )
    needs_grad = torch.is_grad_enabled() and (y.requires_grad or z.requires_grad)
    dtype = torch.promote_types(y.dtype, z.dtype)
    call = Call(z.device.type, dtype, 1, needs_grad, initial_state=False, return_state=False)
    # A compiled graph fuses plain PyTorch with what is around it.
    module = pytorch if kernels.traced(z) else _backends.pick(backend, call)
    return module.gated_mean(y, z)
