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

from modules.ops.kernels import availability, dense_rows, interpreting, supports  # noqa: F401
from modules.ops.operator import Operator
from modules.ops.parameter_sums import parameter_sums
from modules.ops.selective_scan.triton_extent import EXTENTS, USUAL, extent_of

STATES = 16  # a program's at most: more do not fit its registers
CHUNK = 4  # frames loaded ahead by the forward
SEGMENT = 32  # frames between kept states
ENOUGH = 1024  # programs that fill a large card
LEAST = 512  # frames a piece, at least
LANES = 32  # a warp's, which is a program
# The log's words beside the choice of this backend.
FIRST_CALL = (
    "the first calls compile for up to a minute and a half, once a machine; some numbers of "
    "utterances have kernels of their own"
)


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state, return_state
):
    """As `naive.selective_scan`; double backward is not supported."""
    if A.shape[1] > STATES:
        return _in_parts(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state
        )
    reverse_from = 0 if reverse else u.shape[0]
    return _scan(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, lengths, reverse_from)


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


def _scan(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, lengths, reverse_from):
    """One scan a batch, or with one axis more in front a group of them: -> y, last state."""
    tensors = (u, dt, A, B, C, D, z, dt_bias, _turned(initial_state))
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    alone = u.dim() == 3
    if alone:
        tensors = [None if x is None else x.unsqueeze(0) for x in tensors]
    y, last, *_ = _operator(*tensors, dt_softplus, lengths, reverse_from, keep)
    last = last.transpose(2, 3)
    return (y.squeeze(0), last.squeeze(0)) if alone else (y, last)


def _forward(
    u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, lengths, reverse_from, keep
):
    """
    u, dt, z (G, B, T, D), A (G, D, N), B, C (G, B, T, N), D, dt_bias (G, D), states (G, B, N, D):
    G groups of B scans, each group with parameters of its own. From scan reverse_from on (of
    G B) time runs backwards.
    -> y (G, B, T, D), last states; if `keep` the states at the segments' starts, the total of dt
    in the pieces of time, and A as `_turned_rates`
    """
    from modules.ops.selective_scan.triton_kernels import forward_kernel

    A_t, BC = _turned_rates(A), _beside(B, C)
    launch = _launch(u, A, B, C, BC, dt_softplus, reverse_from)
    u, dt, z = (dense_rows(x) for x in (u, dt, z))
    D, dt_bias, lengths = (None if x is None else x.contiguous() for x in (D, dt_bias, lengths))
    y, last, starts, total, none = _shapes(
        u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, lengths, reverse_from, keep
    )
    final = last
    inputs = (u, dt, A_t, BC, D, z, dt_bias, lengths)
    options = {"strided": (u, dt, z), "CHUNK": CHUNK, "SEGMENT": SEGMENT}
    options |= {"EXTRA": launch.extent.extra, "maxnreg": launch.extent.registers}
    if launch.pieces > 1:
        final = last.new_empty(launch.groups, launch.batch, launch.pieces, *last.shape[2:])
        launch(forward_kernel, (*inputs, None, None, final, None, total), **options)
        initial_state = launch.chain(final, total, A_t, initial_state, last, backwards=False)
    outputs = (y, final, starts if keep else None, None)
    launch(forward_kernel, (*inputs, initial_state, *outputs), **options)
    return y, last, starts, total, A_t if keep else none


def _shapes(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, lengths, reverse_from, keep):
    """As `_forward`, of empty tensors; what is kept is flat."""
    groups, batch, frames, channels = u.shape
    pieces, piece_frames = _pieces(groups, batch, frames, channels)
    segments = -(-piece_frames // SEGMENT)
    sums = groups * batch * pieces * channels
    # Enough for any extent: which one it will be, a graph that is compiled does not know.
    places = torch.sym_max(*((4 + x.extra) * x.blocks(channels) for x in EXTENTS))
    kept = groups * batch * pieces * segments * places * LANES
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = u.new_empty(groups, batch, A.shape[2], channels, dtype=torch.float32)
    starts = last.new_empty(kept * _per_lane(A.shape[2]) if keep else 0)
    A_t = last.new_empty(A.mT.shape if keep else 0)
    return y, last, starts, last.new_empty(sums), A_t


def _backward(gradients, args, kept):
    """As an `Operator` wants it; the sums over frames and scans are float32 as well."""
    from modules.ops.selective_scan.triton_backward import backward_kernel
    from modules.ops.selective_scan.triton_sums import message_kernel

    u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, lengths, reverse_from, _ = args
    dy, dlast = gradients
    starts, total, A_t = kept
    BC = _beside(B, C)
    launch = _launch(u, A, B, C, BC, dt_softplus, reverse_from)
    states, blocks, pieces = launch.states, launch.blocks, launch.pieces
    u, dt, z = (dense_rows(x) for x in (u, dt, z))
    D, dt_bias, lengths = (None if x is None else x.contiguous() for x in (D, dt_bias, lengths))
    groups, batch, frames, channels = u.shape
    dy = torch.zeros_like(u) if dy is None else dense_rows(dy)
    dlast = None if dlast is None else dlast.contiguous()
    du, ddt, dz, dB, dC = (
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (u, dt, z, B, C)
    )
    extra, chunk = launch.extent.extra, launch.extent.chunk
    kept_states = (4 + extra) * _per_lane(states) * LANES
    scratch = A_t.new_empty(groups * batch * pieces * blocks, SEGMENT // chunk - 1, kept_states)
    dBC = A_t.new_empty(groups, batch, blocks, frames, 2 * states)
    dparameters = A_t.new_empty(groups, batch, pieces, states + 2, channels)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    first = dinitial
    if pieces > 1:
        before = A_t.new_empty(groups, batch, pieces, states, channels)
        inputs = (dt, A_t, BC, z, dt_bias, lengths, dy, before)
        options = {"CHUNK": CHUNK, "maxnreg": launch.extent.registers}
        launch(message_kernel, inputs, strided=(dt, z, dy), **options)
        dlast = launch.chain(before, total, A_t, dlast, dinitial, backwards=True)
        first = None
    inputs = (u, dt, A_t, BC, D, z, dt_bias, lengths, starts, scratch, dy, dlast)
    options = {"strided": (u, dt, z, dy), "CHUNK": chunk, "SEGMENT": SEGMENT, "EXTRA": extra}
    launch(backward_kernel, (*inputs, du, ddt, dz, dBC, dparameters, first), **options)
    launch.sum_blocks(dBC, dB, dC)
    dA, dD, dbias = parameter_sums(dparameters.flatten(1, 2), A, D, dt_bias)
    given = (du, ddt, dA, dB, dC, dD, dz, dbias, dinitial)
    return [x for x in given if x is not None]


_operator = Operator(
    "selective_scan",
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, bool dt_softplus, Tensor? lengths, SymInt reverse_from, bool keep",
    outputs=5,
    results=2,
    forward=_forward,
    backward=_backward,
    shapes=_shapes,
)


def _pieces(groups, batch, frames, channels):
    """-> into how many pieces time is cut, and the frames of each: whole segments"""
    # sym_min and sym_max, for a compiled graph's sizes are not known when it is made.
    programs = torch.sym_max(groups * batch * USUAL.blocks(channels), 1)
    pieces = torch.sym_max(torch.sym_min(ENOUGH // programs, frames // LEAST), 1)
    piece_frames = -(-frames // (pieces * SEGMENT)) * SEGMENT
    return -(-frames // piece_frames), piece_frames


def _per_lane(states):
    """A channel's states that a thread has place for, as `triton_layout.per_lane`."""
    return 4 if states > 8 else 2 if states > 4 else 1


class _Launch:
    """Runs kernels over a shape's pieces, scans and blocks of channels."""

    def __init__(self, shape, states, reverse_from, softplus, packed, words, extent):
        self.groups, self.batch, self.frames, self.channels = shape
        self.states, self.reverse_from = states, reverse_from
        self.constants = {"SOFTPLUS": softplus, "N": states, "PACKED": packed}
        self.words = words  # from one row of B and C to the next
        self.pieces, self.piece_frames = _pieces(*shape)
        self.extent = extent
        self.blocks = extent.blocks(self.channels)

    def __call__(self, kernel, tensors, strided, **options):
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
                self.words,
                *strides,
                **self.constants,
                **options,
                num_warps=1,
            )

    def chain(self, local, total, A_t, initial, last, backwards):
        """-> the state with which each piece begins, as local; last gets what comes out."""
        from modules.ops.selective_scan.triton_sums import chain_kernel

        starts = torch.empty_like(local)
        last = torch.empty_like(local[:, :, 0]) if last is None else last
        numbers, tile = self.states * self.channels, 128
        if self.batch > 0:
            with torch.cuda.device_of(local):
                chain_kernel[(-(-numbers // tile), self.groups * self.batch)](
                    *(local, total, A_t, initial, starts, last),
                    *(numbers, self.channels, self.pieces, self.batch, self.reverse_from),
                    BACKWARDS=backwards,
                    TILE=tile,
                )
        return starts

    def sum_blocks(self, shares, dB, dC):
        """shares (G, B, blocks, T, 2 N) -> dB, dC (G, B, T, N), always in the same order."""
        from modules.ops.selective_scan.triton_sums import sum_blocks_kernel

        numbers, tile = 2 * self.frames * self.states, 1024
        if self.batch > 0:
            with torch.cuda.device_of(shares):
                sum_blocks_kernel[(-(-numbers // tile), self.groups * self.batch)](
                    *(shares, dB, dC, self.blocks, self.frames),
                    N=self.states,
                    TILE=tile,
                    num_warps=8,
                )


def _launch(u, A, B, C, BC, dt_softplus, reverse_from):
    groups, batch, _frames, channels = u.shape
    extent = extent_of(groups * batch, channels, u.device)
    if _pieces(*u.shape)[0] > 1:
        extent = USUAL  # the one for which the kernels of pieces are made
    options = (reverse_from, dt_softplus, _packed(B, C), BC.stride(2), extent)
    return _Launch(u.shape, A.shape[2], *options)


def _packed(B, C):
    """Whether two numbers of B or C make a word."""
    return B.dtype == C.dtype == torch.bfloat16 and B.shape[-1] % 2 == 0


def _turned_rates(A):
    """A (G, D, N) -> (G, N, D) in float32, times log2(e): one launch, where it is float32"""
    A_t = torch.empty(A.mT.shape, dtype=torch.float32, device=A.device)
    return torch.mul(A.float().mT, math.log2(math.e), out=A_t)


def _beside(B, C):
    """B and C side by side: (G, B, T, 2 N) float32, or, of bfloat16, (G, B, T, N) pairs.

    Rows follow each other, and may lie apart: those of one product, as a layer has them, are not
    copied.
    """
    BC = _one_behind_the_other(B, C)
    if BC is None:
        BC = torch.cat((B, C), dim=-1)
    return BC.view(torch.int32) if _packed(B, C) else BC.float()


def _one_behind_the_other(B, C):
    """B and C as one view of what they are parts of, or None when C is not behind B there."""
    batch, frames, states = B.shape[1:]
    step, size = B.stride(2), B.element_size()
    in_rows = B.stride() == (batch * frames * step, frames * step, step, 1)
    alike = B.stride() == C.stride() and B.dtype == C.dtype
    together = B.untyped_storage().data_ptr() == C.untyped_storage().data_ptr()
    behind = together and C.data_ptr() - B.data_ptr() == states * size
    in_words = step * size % 4 == 0 and B.storage_offset() * size % 4 == 0
    if not (in_rows and alike and behind and in_words):
        return None
    return B.as_strided((*B.shape[:3], 2 * states), B.stride())


def _turned(state):
    """(B, D, N) -> (B, N, D) in float32."""
    return None if state is None else state.float().transpose(1, 2).contiguous()
