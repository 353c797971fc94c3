"""The selective scan by Triton kernels, in one pass forward and one backward, on CUDA devices.

Everything around the recurrence happens inside: dt's bias and softplus, D u, the gate silu(z), the
mask of the lengths, the reversal of time. Frames beyond an utterance's length cost nothing. States
and sums are float32 whatever the dtype of the inputs, and no result depends on the order in which
programs run: two runs agree bit by bit.

The forward keeps a float32 state every CHUNK frames: with N states 4 N / CHUNK bytes a frame and
channel. Parallel over utterances and blocks of channels alone, so a single very long utterance
with few channels leaves most of the card idle.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import functools
import math
import os

import torch
from torch.autograd.function import once_differentiable

from modules.ops.backends import OK, Call

CHANNELS = 32  # a program's
CHUNK = 4  # frames between kept states, and loaded ahead; 8 spill registers in the backward


def availability() -> str:
    if not torch.cuda.is_available() and not interpreting():
        return "needs a CUDA device, and torch sees none"
    return _importable()


def supports(call: Call) -> str:
    if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
        return f"runs on cuda, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {call.dtype}"
    if call.width > 64:
        return f"holds at most 64 states, not {call.width}"
    return OK


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _importable() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux it comes with torch"
    return OK


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state, return_state
):
    """As `naive.selective_scan`; double backward is not supported."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _TritonScan.apply(*tensors, dt_softplus, lengths, reverse, keep)


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, lengths, reverse, keep
    ):
        from modules.ops.selective_scan.triton_kernels import forward_kernel

        batch, frames, channels = u.shape
        states = A.shape[1]
        u, dt, z = (_rows(x) for x in (u, dt, z))
        B, C = (_aligned_rows(x) for x in (B, C))
        A_t = _scaled(A)
        D, dt_bias, lengths = (None if x is None else x.contiguous() for x in (D, dt_bias, lengths))
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        final = A_t.new_empty(batch, states, channels)
        starts = A_t.new_empty(batch, -(-frames // CHUNK), states, channels) if keep else None
        _launch(
            forward_kernel,
            (u, dt, A_t, B, C, D, z, dt_bias, lengths, _state(initial_state), y, final, starts),
            (u, dt, B, C, z),
            y.shape,
            states,
            SOFTPLUS=softplus,
            REVERSE=reverse,
            CHUNK=CHUNK,
        )
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, lengths, starts)
        ctx.softplus, ctx.reverse = softplus, reverse
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, final.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        from modules.ops.selective_scan.triton_kernels import backward_kernel

        u, dt, A, B, C, D, z, dt_bias, lengths, starts = ctx.saved_tensors
        batch, frames, channels = u.shape
        states = A.shape[1]
        dy = torch.zeros_like(u) if dy is None else _rows(dy)
        A_t = _scaled(A)
        du, ddt, dz = (
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (u, dt, z)
        )
        blocks = -(-channels // CHANNELS)
        dA = A_t.new_empty(batch, states, channels)
        dBC = A_t.new_empty(batch, blocks, frames, 2, states)
        dD, ddt_bias = A_t.new_empty(2, batch, channels)
        dinitial = None if ctx.state_dtype is None else torch.empty_like(dA)
        inputs = (u, dt, A_t, B, C, D, z, dt_bias, lengths, starts, dy, _state(dfinal))
        gradients = (du, ddt, dA, dBC, dD, dz, ddt_bias, dinitial)
        _launch(
            backward_kernel,
            (*inputs, *gradients),
            (u, dt, B, C, z, dy),
            u.shape,
            states,
            SOFTPLUS=ctx.softplus,
            REVERSE=ctx.reverse,
            CHUNK=CHUNK,
        )
        dB, dC = dBC.sum(1).unbind(2)
        return (
            du,
            ddt,
            dA.sum(0).t().to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else dD.sum(0).to(D.dtype),
            dz,
            None if dt_bias is None else ddt_bias.sum(0).to(dt_bias.dtype),
            None if dinitial is None else dinitial.transpose(1, 2).to(ctx.state_dtype),
            None,
            None,
            None,
            None,
        )


def _launch(kernel, tensors, strided, shape, states, **constants):
    """Run a program an utterance and block of channels; strided: those that need not be dense."""
    batch, frames, channels = shape
    if batch == 0:
        return
    strides = [stride for x in strided for stride in ((0, 0) if x is None else x.stride()[:2])]
    width = max(1 << (states - 1).bit_length(), 2)
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(tensors[0]):
        kernel[(-(-channels // CHANNELS), batch)](
            *tensors,
            frames,
            channels,
            states,
            *strides,
            **constants,
            N=width,
            CHANNELS=CHANNELS,
            num_warps=max(width // 16, 1),
        )


def _scaled(A):
    """A (D, N) -> (N, D) in float32, times log2(e)."""
    return (A.float() * math.log2(math.e)).t().contiguous()


def _state(x):
    """(B, D, N) -> (B, N, D) in float32."""
    return None if x is None else x.float().transpose(1, 2).contiguous()


def _rows(x):
    """Make each frame's row dense; the rows may lie anywhere."""
    return x if x is None or x.stride(2) == 1 else x.contiguous()


def _aligned_rows(x):
    """Rows that can be read 16 bytes at a time: B and C, which every program reads whole."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in x.stride()[:2])
    return x if aligned and x.stride(2) == 1 else x.contiguous()
