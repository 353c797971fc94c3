"""The selective scan by Triton kernels, in one pass forward and one backward, on CUDA devices.

Everything around the recurrence happens inside: dt's bias and softplus, D u, the gate silu(z), the
mask of the lengths, the reversal of time. Frames beyond an utterance's length cost nothing. States
and sums are float32 whatever the dtype of the inputs, and no result depends on the order in which
programs run: two runs agree bit by bit.

The forward keeps a float32 state every SEGMENT frames: with N states 4 N / SEGMENT bytes a frame
and channel; the backward computes the rest again. Parallel over utterances, directions and blocks
of channels alone, so a single very long utterance leaves most of the card idle.

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import functools
import math
import os

import torch
from torch.autograd.function import once_differentiable

from modules.ops.backends import OK, Call

CHANNELS = 32  # a program's
STATES = 16  # a program's at most: more do not fit its registers
CHUNK = 4  # frames loaded ahead, and held in registers by the backward
SEGMENT = 32  # frames between kept states


def availability() -> str:
    if not torch.cuda.is_available() and not interpreting():
        return "needs a CUDA device, and torch sees none"
    return _importable()


def supports(call: Call) -> str:
    if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
        return f"runs on cuda, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {call.dtype}"
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
    if A.shape[1] > STATES:
        return _in_parts(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state
        )
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    grouped = [None if x is None else x.unsqueeze(0) for x in tensors]
    reverse_from = 0 if reverse else u.shape[0]
    y, state = _scan(*grouped, dt_softplus, lengths, reverse_from)
    return y.squeeze(0), state.squeeze(0)


def bidirectional_scan(u, dt, A, B, C, D, dt_bias, dt_softplus, lengths):
    """As `selective_scan.bidirectional_scan`, both directions in one launch; N up to 16."""
    y, _ = _scan(u, dt, A, B, C, D, None, dt_bias, None, dt_softplus, lengths, u.shape[1])
    return y


def _in_parts(u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state):
    """Scan the states in parts: what they give adds up before the gate."""
    y, states = 0, []
    for i in range(0, A.shape[1], STATES):
        part = slice(i, i + STATES)
        start = None if initial_state is None else initial_state[:, :, part]
        given = (u, dt, A[:, part], B[..., part], C[..., part], D if i == 0 else None)
        share, state = selective_scan(
            *given, None, dt_bias, dt_softplus, lengths, reverse, start, True
        )
        y = y + share.float()
        states.append(state)
    if z is not None:
        # Padding may hold anything, and nothing must come of it.
        z = z if lengths is None else _zero_padding(z, lengths)
        y = y * torch.nn.functional.silu(z.float())
    return y.to(u.dtype), torch.cat(states, dim=2)


def _zero_padding(x, lengths):
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(valid.unsqueeze(-1), x, 0.0)


def _scan(*tensors_and_options):
    tensors = tensors_and_options[:9]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _TritonScan.apply(*tensors_and_options, keep)


class _TritonScan(torch.autograd.Function):
    """u, dt, z (G, B, T, D), A (G, D, N), B, C (G, B, T, N), D, dt_bias (G, D), states
    (G, B, D, N): G groups of B scans, each group with parameters of its own.
    """

    @staticmethod
    def forward(
        ctx, u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, lengths, reverse_from, keep
    ):
        from modules.ops.selective_scan.triton_kernels import forward_kernel

        groups, batch, frames, channels = u.shape
        states = A.shape[2]
        u, dt, z = (_rows(x) for x in (u, dt, z))
        BC = torch.cat((B, C), dim=-1).float().contiguous()
        A_t = _scaled(A)
        D, dt_bias, lengths = (None if x is None else x.contiguous() for x in (D, dt_bias, lengths))
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        final = A_t.new_empty(groups, batch, states, channels)
        segments = -(-frames // SEGMENT)
        starts = A_t.new_empty(groups, batch, segments, states, channels) if keep else None
        _launch(
            forward_kernel,
            (u, dt, A_t, BC, D, z, dt_bias, lengths, _state(initial_state), y, final, starts),
            (u, dt, z),
            y.shape,
            states,
            reverse_from,
            softplus,
        )
        ctx.save_for_backward(u, dt, A, BC, D, z, dt_bias, lengths, starts)
        ctx.options = (states, reverse_from, softplus)
        ctx.dtypes = (B.dtype, C.dtype, None if initial_state is None else initial_state.dtype)
        ctx.set_materialize_grads(False)
        return y, final.transpose(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        from modules.ops.selective_scan.triton_backward import backward_kernel

        u, dt, A, BC, D, z, dt_bias, lengths, starts = ctx.saved_tensors
        states = ctx.options[0]
        groups, batch, frames, channels = u.shape
        dy = torch.zeros_like(u) if dy is None else _rows(dy)
        A_t = _scaled(A)
        du, ddt, dz = (
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (u, dt, z)
        )
        blocks = -(-channels // CHANNELS)
        scratch = A_t.new_empty(groups * batch * blocks, SEGMENT // CHUNK - 1, states, CHANNELS)
        dA = A_t.new_empty(groups, batch, states, channels)
        dBC = A_t.new_empty(groups, batch, blocks, frames, 2 * states)
        dD, ddt_bias = A_t.new_empty(2, groups, batch, channels)
        dinitial = None if ctx.dtypes[2] is None else torch.empty_like(dA)
        inputs = (u, dt, A_t, BC, D, z, dt_bias, lengths, starts, scratch, dy, _state(dfinal))
        gradients = (du, ddt, dA, dBC, dD, dz, ddt_bias, dinitial)
        _launch(backward_kernel, (*inputs, *gradients), (u, dt, z, dy), u.shape, *ctx.options)
        dB, dC = _sum_blocks(dBC).split(states, dim=-1)
        return (
            du,
            ddt,
            dA.sum(1).transpose(1, 2).to(A.dtype),
            dB.to(ctx.dtypes[0]),
            dC.to(ctx.dtypes[1]),
            None if D is None else dD.sum(1).to(D.dtype),
            dz,
            None if dt_bias is None else ddt_bias.sum(1).to(dt_bias.dtype),
            None if dinitial is None else dinitial.transpose(2, 3).to(ctx.dtypes[2]),
            *(None,) * 4,
        )


def _launch(kernel, tensors, strided, shape, states, reverse_from, softplus):
    """Run a program a scan and block of channels; strided: those that need not be dense."""
    groups, batch, frames, channels = shape
    if batch == 0:
        return
    strides = [s for x in strided for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(tensors[0]):
        kernel[(-(-channels // CHANNELS), groups * batch)](
            *tensors,
            frames,
            channels,
            batch,
            reverse_from,
            *strides,
            SOFTPLUS=softplus,
            N=states,
            CHUNK=CHUNK,
            SEGMENT=SEGMENT,
            num_warps=1,
        )


def _sum_blocks(shares):
    """(G, B, blocks, T, N) -> (G, B, T, N), always in the same order."""
    from modules.ops.selective_scan.triton_backward import sum_blocks_kernel

    groups, batch, blocks, frames, states = shares.shape
    total = shares.new_empty(groups, batch, frames, states)
    numbers, tile = frames * states, 1024
    if batch > 0:
        with torch.cuda.device_of(shares):
            grid = (-(-numbers // tile), groups * batch)
            sum_blocks_kernel[grid](shares, total, blocks, numbers, TILE=tile)
    return total


def _scaled(A):
    """A (G, D, N) -> (G, N, D) in float32, times log2(e)."""
    return (A.float() * math.log2(math.e)).transpose(1, 2).contiguous()


def _state(x):
    """(G, B, D, N) -> (G, B, N, D) in float32."""
    return None if x is None else x.float().transpose(2, 3).contiguous()


def _rows(x):
    """Make each frame's row dense; the rows may lie anywhere."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()
