"""The selective scan in plain PyTorch, blocked over time, with an analytic backward.

Runs wherever PyTorch does. Only the state at the start of every block is kept for the backward,
which recomputes the others block by block: memory grows with B T D (the result and the gradients)
and not with B T D N, whatever the number of frames.

Nothing is ever divided by a product of decays: every factor is exp(dt A) of one or several frames,
at most 1, so any dt and A are safe.

A block holds `chunks` runs of `steps` frames. On a CPU chunks = 1: one in-place addcmul a frame,
the least work. Where a launch costs more than its work (CUDA, MPS) the chunks advance side by
side, twice: from zero for their end states, which one pass over the chunks turns into their true
start states, then from those. That takes 2 steps + chunks launches for steps x chunks frames.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from modules.ops.backends import OK, Call
from modules.ops.padding import padding_mask


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state, return_state
):
    """As `naive.selective_scan`; double backward is not supported."""
    batch, frames, _ = u.shape
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    layout = Layout(
        blocks=blocks(frames, *block_shape(u.device.type, batch * A.numel(), frames)),
        frames=frames,
        reverse=reverse,
        padding=padding_mask(lengths, frames),
        dtype=torch.float64 if u.dtype == torch.float64 else torch.float32,
    )
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not keep and [chunks for _, chunks, _ in layout.blocks] == [1]:
        return _scan_one_block(*tensors, dt_softplus, layout)
    return _ChunkedScan.apply(*tensors, dt_softplus, layout, keep)


def _scan_one_block(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, layout):
    """The forward pass of few frames, as a stream has them: a call costs more than its sums."""

    def load(x):
        x = x.to(layout.dtype)
        x = x if padding is None else x.masked_fill(padding, 0)
        return x.flip(1) if layout.reverse else x

    padding = layout.padding
    with torch.autocast(u.device.type, enabled=False):
        A_t, u_o, dt_o = A.to(layout.dtype).t(), load(u), dt.to(layout.dtype)
        if dt_bias is not None:
            dt_o = dt_o + dt_bias.to(layout.dtype)
        dt_o = load(nn.functional.softplus(dt_o) if dt_softplus else dt_o)
        decay = (dt_o.unsqueeze(2) * A_t).exp_()  # (B, T, N, D), like the states
        states = (dt_o * u_o).unsqueeze(2) * load(B).unsqueeze(3)
        h = None if initial_state is None else initial_state.to(layout.dtype).transpose(1, 2)
        for decay_t, state in zip(decay.unbind(1), states.unbind(1), strict=True):
            if h is not None:
                state.addcmul_(decay_t, h)
            h = state
        y = torch.matmul(load(C).unsqueeze(2), states).squeeze(2)
        if D is not None:
            y.addcmul_(u_o, D.to(layout.dtype))
        y = y.flip(1) if layout.reverse else y
        if z is not None:
            y = y.mul_(nn.functional.silu(z.to(layout.dtype)))
        y = y if padding is None else y.masked_fill_(padding, 0)
        return y.to(u.dtype), h.transpose(1, 2).clone()


def block_shape(device: str, state_size: int, frames: int) -> tuple[int, int]:
    """Chunks and steps of a block when all states of one frame are `state_size` = B D N numbers."""
    if device == "cpu":
        # 4 MB a buffer in float32: most steps that stay in cache (tuned with benchmarks/scan.py).
        return 1, min(max(2**20 // state_size, 8), 64)
    # 128 MB a buffer in float32: enough work to hide the launches, little beside a model's own.
    frames = min(max(2**25 // state_size, 16), frames)
    steps = max(math.isqrt(frames // 2), 1)  # the least of 2 steps + chunks
    return frames // steps, steps


def blocks(frames: int, chunks: int, steps: int) -> list[tuple[int, int, int]]:
    """Cut frames into (first frame, chunks, steps) without a remainder to pad."""
    cuts, first = [], 0
    while first < frames:
        left = frames - first
        n_steps = min(steps, left)
        n_chunks = min(chunks, left // n_steps)
        cuts.append((first, n_chunks, n_steps))
        first += n_chunks * n_steps
    return cuts


@dataclass(frozen=True)
class Layout:
    """Between (B, T, X) as the caller has it and the (steps, chunks, B, X) of a block."""

    blocks: list[tuple[int, int, int]]  # in the order of the scan
    frames: int
    reverse: bool
    padding: torch.Tensor | None  # (B, T, 1)
    dtype: torch.dtype

    def load(self, x, block):
        """Cut a block out of x (B, T, X), zero on padding -> (steps, chunks, B, X)."""
        return self.masked(self._ordered(self._view(x, block).to(self.dtype)), block)

    def load_dt(self, dt, dt_bias, dt_softplus, block):
        """Load the dt that the recurrence uses, (steps, chunks, B, D)."""
        dt = self.load(dt, block)
        if dt_bias is not None:
            dt = dt + dt_bias.to(self.dtype)
        # Masked again: the bias and the softplus make padding nonzero.
        return self.masked(nn.functional.softplus(dt) if dt_softplus else dt, block)

    def store(self, target, x, block):
        """Write x (steps, chunks, B, X) into its place in target (B, T, X), zero on padding."""
        self._view(target, block).copy_(self._ordered(self.masked(x, block)))

    def buffers(self, count, state):
        """Room for all states of the largest block; one allocation keeps a CPU's cache warm."""
        frames = max(chunks * steps for _, chunks, steps in self.blocks)
        return state.new_empty(count, frames * state.numel())

    def fit(self, buffer, block, state):
        """-> (steps, chunks, B, N, D)"""
        _, chunks, steps = block
        return buffer[: steps * chunks * state.numel()].view(steps, chunks, *state.shape)

    def _view(self, x, block):
        first, chunks, steps = block
        last = first + chunks * steps
        span = (
            slice(self.frames - last, self.frames - first) if self.reverse else slice(first, last)
        )
        return x[:, span].unflatten(1, (chunks, steps)).permute(2, 1, 0, 3)

    def _ordered(self, x):
        return x.flip(0, 1) if self.reverse else x

    def masked(self, x, block):
        if self.padding is None:
            return x
        return x.masked_fill(self._ordered(self._view(self.padding, block)), 0)


class _ChunkedScan(torch.autograd.Function):
    """Names ending in _b are one block's, (steps, chunks, B, X); those ending in _t transposed."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, layout, keep):
        with torch.autocast(u.device.type, enabled=False):
            A_t = A.to(layout.dtype).t().contiguous()  # (N, D)
            if initial_state is None:
                h = A_t.new_zeros(u.shape[0], *A_t.shape)
            else:
                h = initial_state.to(layout.dtype).transpose(1, 2).contiguous()
            saved = h.new_empty(len(layout.blocks), *h.shape) if keep else None
            y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
            buffers = layout.buffers(2, h)
            for number, block in enumerate(layout.blocks):
                if keep:
                    saved[number] = h
                dt_b = layout.load_dt(dt, dt_bias, dt_softplus, block)
                u_b = layout.load(u, block)
                decay, states = (layout.fit(x, block, h) for x in buffers)
                _run(dt_b, dt_b * u_b, layout.load(B, block), A_t, h, decay, states)
                h = states[-1, -1].clone()  # the next block reuses the buffer
                y_b = _sum_states(layout.load(C, block), states, out=decay)
                if D is not None:
                    y_b.addcmul_(u_b, D.to(layout.dtype))
                if z is not None:
                    y_b.mul_(nn.functional.silu(layout.load(z, block)))
                layout.store(y, y_b, block)
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, saved)
        ctx.dt_softplus, ctx.layout = dt_softplus, layout
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, h.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, dt, A, B, C, D, z, dt_bias, saved = ctx.saved_tensors
        layout, dtype = ctx.layout, ctx.layout.dtype
        if dy is None:
            dy = torch.zeros_like(u)
        with torch.autocast(u.device.type, enabled=False):
            A_t = A.to(dtype).t().contiguous()
            # What the frames after the current block want of its last state.
            message = torch.zeros_like(saved[0])
            if dstate is not None:
                message += dstate.transpose(1, 2)
            du, ddt, dB, dC = (
                torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, dt, B, C)
            )
            dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
            dA_t = torch.zeros_like(A_t)
            dD, ddt_bias = A_t.new_zeros(2, A_t.shape[1])

            buffers = layout.buffers(3, message)
            for block, start in zip(reversed(layout.blocks), reversed(saved.unbind()), strict=True):
                dt_b = layout.load_dt(dt, dt_bias, ctx.dt_softplus, block)
                u_b, B_b, C_b, dy_b = (layout.load(x, block) for x in (u, B, C, dy))
                decay, states, dstates = (layout.fit(x, block, start) for x in buffers)
                dt_u = dt_b * u_b
                starts = _run(dt_b, dt_u, B_b, A_t, start, decay, states)

                if z is not None:
                    y_b = _sum_states(C_b, states, out=dstates)
                    if D is not None:
                        y_b.addcmul_(u_b, D.to(dtype))
                    gate, slope = _silu_and_slope(layout.load(z, block))
                    layout.store(dz, y_b.mul_(dy_b).mul_(slope), block)
                    dy_b = gate.mul_(dy_b)
                layout.store(dC, _sum_channels(dy_b, states, out=dstates), block)

                torch.mul(C_b[..., None], dy_b[..., None, :], out=dstates)
                message = _run_back(dt_b, A_t, message, decay, dstates)

                # The gradient of dt A, dh_t exp(dt_t A) h_{t-1}, takes the place of the decay.
                dlog = decay.mul_(dstates)
                dlog[1:].mul_(states[:-1])
                dlog[0].mul_(starts)
                # From here on `states` is scratch.
                layout.store(dB, _sum_channels(dt_u, dstates, out=states), block)
                ddt_u = _sum_states(B_b, dstates, out=states)
                ddt_b = torch.mul(dlog, A_t, out=states).sum(-2).addcmul_(ddt_u, u_b)
                dA_t += dlog.mul_(dt_b[..., None, :]).sum((0, 1, 2))
                if ctx.dt_softplus:
                    ddt_b.mul_(dt_b.neg().expm1_().neg_())  # softplus' = 1 - exp(-softplus)
                ddt_b = layout.masked(ddt_b, block)
                layout.store(ddt, ddt_b, block)
                ddt_bias += ddt_b.sum((0, 1, 2))

                du_b = ddt_u.mul_(dt_b)
                if D is not None:
                    dD += (dy_b * u_b).sum((0, 1, 2))
                    du_b.addcmul_(dy_b, D.to(dtype))
                layout.store(du, du_b, block)

        dinitial = None if ctx.state_dtype is None else message.transpose(1, 2).to(ctx.state_dtype)
        return (
            du,
            ddt,
            dA_t.t().to(A.dtype),
            dB,
            dC,
            None if D is None else dD.to(D.dtype),
            dz,
            None if dt_bias is None else ddt_bias.to(dt_bias.dtype),
            dinitial,
            None,
            None,
            None,
        )


def _run(dt, dt_u, B, A_t, start, decay, states):
    """Fill decay and states (steps, chunks, B, N, D) of one block that starts from start (B, N, D).

    -> the state before every chunk (chunks, B, N, D)
    """
    torch.mul(dt[..., None, :], A_t, out=decay).exp_()
    torch.mul(B[..., None], dt_u[..., None, :], out=states)
    starts = start[None]
    if states.shape[1] > 1:
        ends = states[0]
        for a, x in zip(decay[1:], states[1:], strict=True):
            ends = torch.addcmul(x, a, ends)
        starts = _carry(start, _total_decay(dt, A_t), ends)[:-1]
    h = starts
    for a, x in zip(decay, states, strict=True):
        h = x.addcmul_(a, h)
    return starts


def _run_back(dt, A_t, message, decay, dstates):
    """Turn dstates, what y wants of each state, into the full gradient, in place.

    message: (B, N, D), what the next block wants of the last state -> the same for the block before
    """
    messages = message[None]
    if dstates.shape[1] > 1:
        ends = dstates[-1]
        for a, x in zip(reversed(decay[1:].unbind()), reversed(dstates[:-1].unbind()), strict=True):
            ends = torch.addcmul(x, a, ends)
        totals = _total_decay(dt, A_t)
        messages = _carry(message, totals.flip(0), (ends * decay[0]).flip(0))[:-1].flip(0)
    dh = dstates[-1].add_(messages)
    for a, x in zip(reversed(decay[1:].unbind()), reversed(dstates[:-1].unbind()), strict=True):
        dh = x.addcmul_(a, dh)
    return decay[0, 0] * dstates[0, 0]


def _silu_and_slope(z):
    """-> silu(z), its derivative sigmoid(z) + silu(z) (1 - sigmoid(z))"""
    sigmoid = torch.sigmoid(z)
    silu = sigmoid * z
    return silu, (1 - sigmoid).mul_(silu).add_(sigmoid)


def _total_decay(dt, A_t):
    return torch.mul(dt.sum(0)[..., None, :], A_t).exp_()  # (chunks, B, N, D)


def _carry(start, totals, ends):
    """h_0 = start, h_{c+1} = totals_c h_c + ends_c -> (chunks + 1, B, N, D)"""
    h = torch.empty(len(ends) + 1, *start.shape, dtype=start.dtype, device=start.device)
    h[0] = start
    for c in range(len(ends)):
        torch.addcmul(ends[c], totals[c], h[c], out=h[c + 1])
    return h


# By matmul on CPUs alone, where it reads the states once: on CUDA it may round to TF32.
def _sum_states(weights, states, out):
    """weights (..., N), states (..., N, D) -> (..., D)"""
    if states.device.type == "cpu":
        return torch.matmul(weights.unsqueeze(-2), states).squeeze(-2)
    return torch.mul(weights[..., None], states, out=out).sum(-2)


def _sum_channels(weights, states, out):
    """weights (..., D), states (..., N, D) -> (..., N)"""
    return torch.mul(weights[..., None, :], states, out=out).sum(-1)
