"""The selective scan by Triton kernels, in one pass forward and one backward, on CUDA devices.

Everything around the recurrence happens inside: dt's bias and softplus, D u, the gate silu(z), the
mask of the lengths, the reversal of time. Frames beyond an utterance's length cost nothing. States
and sums are float32 whatever the dtype of the inputs, and no result depends on the order in which
programs run: two runs agree bit by bit.

The forward keeps a float32 state every SEGMENT frames: with N states 4 N / SEGMENT bytes a frame
and channel; the backward computes the rest again. Where utterances, directions and blocks of
channels are too few to fill the card, time is cut into pieces as well, at the price of a third more
work (see `triton_sums`).

TRITON_INTERPRET=1 (set before triton is imported) runs the kernels on a CPU, for tests.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from modules.ops.kernels import availability, dense_rows, interpreting, supports  # noqa: F401

CHANNELS = 32  # a program's
STATES = 16  # a program's at most: more do not fit its registers
CHUNK = 4  # frames loaded ahead, and held in registers by the backward
SEGMENT = 32  # frames between kept states
ENOUGH = 1024  # programs that fill a large card
LEAST = 512  # frames a piece, at least


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state, return_state
):
    """As `naive.selective_scan`; double backward is not supported."""
    if A.shape[1] > STATES:
        return _in_parts(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state
        )
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return _scan(*tensors, dt_softplus, lengths, 0 if reverse else u.shape[0])


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
    (G, B, D, N): G groups of B scans, each group with parameters of its own. Without G: one.
    """

    @staticmethod
    def forward(
        ctx, u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, lengths, reverse_from, keep
    ):
        from modules.ops.selective_scan.triton_kernels import forward_kernel

        ctx.dtypes = [None if x is None else x.dtype for x in (A, B, C, D, dt_bias, initial_state)]
        ctx.alone = u.dim() == 3
        tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
        if ctx.alone:
            tensors = [None if x is None else x.unsqueeze(0) for x in tensors]
        u, dt, A, B, C, D, z, dt_bias, initial = tensors

        groups, batch, _, channels = u.shape
        u, dt, z = (dense_rows(x) for x in (u, dt, z))
        BC, packed = _side_by_side(B, C)
        A_t = _scaled(A)
        D, dt_bias, lengths = (None if x is None else x.contiguous() for x in (D, dt_bias, lengths))
        launch = _Launch(u.shape, A.shape[2], reverse_from, softplus, packed)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        final = A_t.new_empty(groups, batch, launch.pieces, launch.states, channels)
        segments = -(-launch.piece_frames // SEGMENT)
        starts = A_t.new_empty(*final.shape[:3], segments, *final.shape[3:]) if keep else None
        total = None
        initial = _state(initial)
        inputs = (u, dt, A_t, BC, D, z, dt_bias, lengths)
        options = {"strided": (u, dt, z), "CHUNK": CHUNK, "SEGMENT": SEGMENT}
        if launch.pieces > 1:
            total = A_t.new_empty(*final.shape[:3], channels)
            launch(forward_kernel, (*inputs, None, None, final, None, total), **options)
            initial, last = launch.chain(final, total, A_t, initial, backwards=False)
        launch(forward_kernel, (*inputs, initial, y, final, starts, None), **options)
        if launch.pieces == 1:
            last = final.squeeze(2)
        ctx.save_for_backward(u, dt, A_t, BC, D, z, dt_bias, lengths, starts, total)
        ctx.launch = launch
        ctx.set_materialize_grads(False)
        last = last.transpose(2, 3)
        return (y.squeeze(0), last.squeeze(0)) if ctx.alone else (y, last)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        from modules.ops.selective_scan.triton_backward import backward_kernel
        from modules.ops.selective_scan.triton_sums import message_kernel

        u, dt, A_t, BC, D, z, dt_bias, lengths, starts, total = ctx.saved_tensors
        launch, states = ctx.launch, ctx.launch.states
        A_dtype, B_dtype, C_dtype, D_dtype, bias_dtype, state_dtype = ctx.dtypes
        if ctx.alone:
            dy, dfinal = (None if x is None else x.unsqueeze(0) for x in (dy, dfinal))
        groups, batch, pieces, _, _, channels = starts.shape
        dy = torch.zeros_like(u) if dy is None else dense_rows(dy)
        du, ddt, dz = (
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (u, dt, z)
        )
        blocks = launch.blocks
        scratch = A_t.new_empty(
            groups * batch * pieces * blocks, SEGMENT // CHUNK - 1, states, CHANNELS
        )
        dBC = A_t.new_empty(groups, batch, blocks, u.shape[2], 2 * states)
        dparameters = A_t.new_empty(groups, batch, pieces, states + 2, channels)
        dinitial, dfinal = None, _state(dfinal)
        if pieces > 1:
            before = A_t.new_empty(groups, batch, pieces, states, channels)
            inputs = (dt, A_t, BC, z, dt_bias, lengths, dy, before)
            launch(message_kernel, inputs, strided=(dt, z, dy), CHUNK=CHUNK)
            dfinal, dinitial = launch.chain(before, total, A_t, dfinal, backwards=True)
        elif state_dtype is not None:
            dinitial = A_t.new_empty(groups, batch, states, channels)
        inputs = (u, dt, A_t, BC, D, z, dt_bias, lengths, starts, scratch, dy, dfinal)
        gradients = (du, ddt, dz, dBC, dparameters, dinitial if pieces == 1 else None)
        options = {"strided": (u, dt, z, dy), "CHUNK": CHUNK, "SEGMENT": SEGMENT}
        launch(backward_kernel, (*inputs, *gradients), **options)
        dB, dC = (u.new_empty(*u.shape[:3], states, dtype=x) for x in (B_dtype, C_dtype))
        launch.sum_blocks(dBC, dB, dC)
        dparameters = dparameters.sum((1, 2))
        given = (
            du,
            ddt,
            dparameters[:, :-2].transpose(1, 2).to(A_dtype),
            dB,
            dC,
            None if D is None else dparameters[:, -2].to(D_dtype),
            dz,
            None if dt_bias is None else dparameters[:, -1].to(bias_dtype),
            None if state_dtype is None else dinitial.transpose(2, 3).to(state_dtype),
        )
        if ctx.alone:
            given = (None if x is None else x.squeeze(0) for x in given)
        return (*given, None, None, None, None)


class _Launch:
    """Runs kernels over a shape's pieces, scans and blocks of channels."""

    def __init__(self, shape, states, reverse_from, softplus, packed):
        self.groups, self.batch, self.frames, self.channels = shape
        self.states, self.reverse_from = states, reverse_from
        self.constants = {"SOFTPLUS": softplus, "N": states, "PACKED": packed}
        self.blocks = -(-self.channels // CHANNELS)
        programs = max(self.groups * self.batch * self.blocks, 1)
        pieces = max(min(ENOUGH // programs, self.frames // LEAST), 1)
        # Whole segments a piece.
        self.piece_frames = -(-self.frames // (pieces * SEGMENT)) * SEGMENT
        if pieces == 1:
            self.piece_frames = self.frames
        self.pieces = -(-self.frames // self.piece_frames)

    def __call__(self, kernel, tensors, strided, **constants):
        """strided: the tensors whose rows need not be dense."""
        if self.batch == 0:
            return
        strides = [s for x in strided for s in ((0, 0, 0) if x is None else x.stride()[:3])]
        # Triton launches on the current device, whatever the tensors' own.
        with torch.cuda.device_of(tensors[0]):
            kernel[(self.blocks, self.groups * self.batch * self.pieces)](
                *tensors,
                self.frames,
                self.piece_frames,
                self.channels,
                self.batch,
                self.reverse_from,
                *strides,
                **self.constants,
                **constants,
                num_warps=1,
            )

    def chain(self, local, total, A_t, initial, backwards):
        """-> the state with which each piece begins, as local; what comes out at the end."""
        from modules.ops.selective_scan.triton_sums import chain_kernel

        starts, last = torch.empty_like(local), torch.empty_like(local[:, :, 0])
        numbers, tile = self.states * self.channels, 128
        if self.batch > 0:
            with torch.cuda.device_of(local):
                chain_kernel[(-(-numbers // tile), self.groups * self.batch)](
                    *(local, total, A_t, initial, starts, last),
                    *(numbers, self.channels, self.pieces, self.batch, self.reverse_from),
                    BACKWARDS=backwards,
                    TILE=tile,
                )
        return starts, last

    def sum_blocks(self, shares, dB, dC):
        """shares (G, B, blocks, T, 2 N) -> dB, dC (G, B, T, N), always in the same order."""
        from modules.ops.selective_scan.triton_sums import sum_blocks_kernel

        numbers, tile = 2 * self.frames * self.states, 1024
        if self.batch > 0:
            with torch.cuda.device_of(shares):
                sum_blocks_kernel[(-(-numbers // tile), self.groups * self.batch)](
                    *(shares, dB, dC, self.blocks, numbers), N=self.states, TILE=tile
                )


def _side_by_side(B, C):
    """B, C (G, B, T, N) -> (G, B, T, 2 N) float32, False; (G, B, T, N) pairs of bfloat16, True."""
    packed = B.dtype == C.dtype == torch.bfloat16 and B.shape[-1] % 2 == 0
    BC = torch.cat((B, C), dim=-1)
    return (BC.view(torch.int32), True) if packed else (BC.float(), False)


def _scaled(A):
    """A (G, D, N) -> (G, N, D) in float32, times log2(e)."""
    return (A.float() * math.log2(math.e)).transpose(1, 2).contiguous()


def _state(x):
    """(G, B, D, N) -> (G, B, N, D) in float32."""
    return None if x is None else x.float().transpose(2, 3).contiguous()
