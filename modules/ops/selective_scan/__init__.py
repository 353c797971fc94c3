"""The selective scan of Mamba: the public function, its checks and the choice of backend."""

import torch

from modules.ops import kernels
from modules.ops.backends import Backends, Call
from modules.ops.selective_scan import chunked, cuda, doubling, naive, scan, scripted, triton
from modules.ops.shapes import check_shapes

# In the order in which "auto" tries them.
_backends = Backends(
    "selective_scan",
    "MAMBA_ASR_SCAN_BACKEND",
    {
        # Interpreted, for tests, it runs on CPUs too: then chunked goes before it.
        **({} if triton.interpreting() else {"triton": triton}),
        "mamba_ssm": cuda,
        "chunked": chunked,
        "triton": triton,
        "naive": naive,
        # For exported graphs, which `exporting` asks for.
        "scan": scan,
        "doubling": doubling,
        "scripted": scripted,
    },
    reference="naive",
)
set_backend = _backends.set_default
available_backends = _backends.available
exporting = _backends.forced


def is_exporting() -> bool:
    """Whether a graph is being exported, in which a scan is what `exporting` asks for."""
    return _backends.required is not None


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scan a right-padded batch (Gu & Dao 2023, arXiv 2312.00752, section 3).

        dt = softplus(dt + dt_bias), h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = (C_t h_t + D u_t) silu(z_t)

    u, dt, z: (B, T, D); A: (D, N), negative; B, C: (B, T, N); D, dt_bias: (D,)
    lengths: (B,) integers, in frames. Frames from there on leave the state alone and give zeros,
        whatever the inputs hold there.
    reverse: run from frame lengths - 1 down to 0.
    initial_state: (B, D, N), zero if None.
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_SCAN_BACKEND, then `set_backend`, then the device.
    -> y (B, T, D) in u's dtype, or (y, state): h (B, D, N) after the last valid frame in the
        direction of the scan. States are float32 (float64 if u is). Gradients reach every input,
        also from the state.
    Raises ValueError on shapes that do not fit, UserError on a backend that cannot run.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, lengths, initial_state)
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    call = Call(
        device=u.device.type,
        dtype=u.dtype,
        width=A.shape[1],
        needs_grad=torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in tensors),
        initial_state=initial_state is not None,
        return_state=return_state,
    )
    module = triton if kernels.traced(u) else _backends.pick(backend, call)
    run = module.selective_scan
    if u.shape[1] == 0:
        y, state = torch.zeros_like(u), _empty_scan_state(u, A, initial_state)
    else:
        y, state = run(
            u,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            dt_softplus,
            lengths,
            reverse,
            initial_state,
            return_state,
        )
    return (y, state) if return_state else y


def bidirectional_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    dt_softplus: bool = False,
    lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Two scans of a batch, the second backwards in time, each with parameters of its own.

    u, dt: (2, B, T, D); A: (2, D, N); B, C: (2, B, T, N); D, dt_bias: (2, D); lengths: (B,)
    -> (2, B, T, D). Otherwise as `selective_scan`; a backend that can takes both in one launch.
    """
    for i in (0, 1):
        _check(u[i], dt[i], A[i], B[i], C[i], D[i], None, dt_bias[i], lengths, None)
    call = Call(
        device=u.device.type,
        dtype=u.dtype,
        width=A.shape[2],
        needs_grad=torch.is_grad_enabled()
        and any(x.requires_grad for x in (u, dt, A, B, C, D, dt_bias)),
        initial_state=False,
        return_state=False,
    )
    module = triton if kernels.traced(u) else _backends.pick(backend, call)
    together = getattr(module, "bidirectional_scan", None)
    if together is not None and A.shape[2] <= module.STATES and u.shape[2] > 0:
        return together(u, dt, A, B, C, D, dt_bias, dt_softplus, lengths)
    directions = (
        selective_scan(
            *(x[i] for x in (u, dt, A, B, C, D)),
            dt_bias=dt_bias[i],
            dt_softplus=dt_softplus,
            lengths=lengths,
            reverse=i == 1,
            backend=backend,
        )
        for i in (0, 1)
    )
    return torch.stack(tuple(directions))


def _empty_scan_state(u, A, initial_state):
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    if initial_state is None:
        return u.new_zeros(u.shape[0], *A.shape, dtype=dtype)
    return initial_state.to(dtype)


def _check(u, dt, A, B, C, D, z, dt_bias, lengths, initial_state):
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"u is {tuple(u.shape)} and A {tuple(A.shape)}; expected (B, T, D) and (D, N)"
        )
    batch, frames, channels = u.shape
    states = A.shape[1]
    expected = {
        "dt": (dt, (batch, frames, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, frames, states)),
        "C": (C, (batch, frames, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, frames, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "lengths": (lengths, (batch,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    check_shapes(expected, u=(u, "(B, T, D)"), A=(A, "(D, N)"))
