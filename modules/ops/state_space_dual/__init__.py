"""The state-space dual of Mamba-2: the public function, its checks and the choice of backend."""

import contextlib

import torch
from torch.nn import functional as F  # noqa: N812

from modules.ops.backends import Backends, Call
from modules.ops.padding import padding_mask
from modules.ops.selective_scan import is_exporting
from modules.ops.shapes import check_shapes
from modules.ops.state_space_dual import chunked, naive, scan

# In the order in which "auto" tries them.
_backends = Backends(
    "state_space_dual",
    "MAMBA_ASR_DUAL_BACKEND",
    {"chunked": chunked, "scan": scan, "naive": naive},
    reference="naive",
)
available_backends = _backends.available


def state_space_dual(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
    initial_state: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan a right-padded batch, one decay a head (Dao & Gu 2024, arXiv 2405.21060, section 6).

        dt = softplus(dt + dt_bias), h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'
        y_t = h_t C_t + D x_t

    x: (B, T, H, P), P channels a head; dt: (B, T, H); A: (H,), negative; B, C: (B, T, N), those
    of all heads; D, dt_bias: (H,)
    lengths: (B,) integers, in frames. Frames from there on leave the state alone and give zeros,
        whatever the inputs hold there.
    reverse: run from frame lengths - 1 down to 0.
    initial_state: (B, H, P, N), zero if None.
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_DUAL_BACKEND, then the device.
    -> y (B, T, H, P) in x's dtype, the state after the last valid frame in the direction of the
        scan, in float32 (float64 if x is). Decays are float32 too; products take bfloat16 as it
        comes. Gradients reach every input, also from the state.
    Raises ValueError on shapes that do not fit, UserError on a backend that cannot run.
    """
    _check(x, dt, A, B, C, D, dt_bias, lengths, initial_state)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[2], dtype=dtype)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)  # where it is off, an exported graph knows none
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        padding = padding_mask(lengths, x.shape[1])
        dt = F.softplus(_masked(dt, padding).to(dtype) + dt_bias.to(dtype))
        dt = _masked(dt, padding)  # the state then passes through padded frames unchanged
        # 0 x NaN is NaN, in the result or in its gradient.
        x, B, C = (_masked(t, padding) for t in (x, B, C))
        inputs = [t.flip(1) if reverse else t for t in (x, dt, B, C)]
        y, state = _run(*inputs, A.to(dtype), initial_state.to(dtype), backend)
        y = y.flip(1) if reverse else y
        y = y + D.to(dtype).unsqueeze(1) * x
        return _masked(y, padding).to(x.dtype), state


def _run(x, dt, B, C, A, h, backend):
    """The recurrence alone, forward in time: -> y in float32 (float64 if x is), state."""
    if x.shape[1] == 0:
        return x.to(h.dtype), h
    if is_exporting():
        module = scan
    elif torch.compiler.is_compiling():
        module = chunked  # the choice, with its environment variables and its log, is not traced
    else:
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, B, C, A, h))
        call = Call(x.device.type, x.dtype, B.shape[2], grad, initial_state=True, return_state=True)
        module = _backends.pick(backend, call)
    return module.state_space_dual(x, dt, A, B, C, h)


def _masked(t, padding):
    """t (B, T, ...), zero on padded frames."""
    if padding is None:
        return t
    return t.masked_fill(padding.unflatten(2, [1] * (t.dim() - 2)), 0)


def _check(x, dt, A, B, C, D, dt_bias, lengths, initial_state):
    if x.dim() != 4 or B.dim() != 3:
        raise ValueError(
            f"x is {tuple(x.shape)} and B {tuple(B.shape)}; expected (B, T, H, P) and (B, T, N)"
        )
    batch, frames, heads, channels = x.shape
    states = B.shape[2]
    expected = {
        "dt": (dt, (batch, frames, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, frames, states)),
        "C": (C, (batch, frames, states)),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "lengths": (lengths, (batch,)),
        "initial_state": (initial_state, (batch, heads, channels, states)),
    }
    check_shapes(expected, x=(x, "(B, T, H, P)"), B=(B, "(B, T, N)"))
