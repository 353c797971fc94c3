"""Mamba-2 and its bidirectional form, mixers by matrix products (Dao & Gu 2024, arXiv 2405.21060).

Against Mamba, a head of channels decays as one, B and C serve all heads, and all of dt, B and C
comes from the layer's input, beside x and the gate z. Names as in `modules.mamba`; H heads of
P = d_head channels.
"""

import torch
from torch import nn

from modules.mamba import convolve, dt_bias_of, run_in_chunks
from modules.ops.gating import gated_mean
from modules.ops.state_space_dual import state_space_dual

# Inductor's analysis of tilings, which does not apply to batches of any size yet, ends with an
# assertion on the sums of the backward pass (2.11).
INDUCTOR = {"triton.coalesce_tiling_analysis": False}


class DualSSM(nn.Module):
    """One direction: causal convolution of x, B and C, then the scan.

    Arguments
    ---------
    d_inner, d_state, d_conv, d_head : int
        Channels, states a channel, convolution width, channels a head.
    reverse : bool
        Run from each utterance's last frame to its first.
    """

    def __init__(self, d_inner, d_state, d_conv, d_head, reverse=False):
        super().__init__()
        self.d_inner, self.d_state, self.d_head, self.reverse = d_inner, d_state, d_head, reverse
        heads, convolved = d_inner // d_head, d_inner + 2 * d_state
        self.conv1d = nn.Conv1d(convolved, convolved, d_conv, groups=convolved)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(dt_bias_of(heads))
        self.A_log.no_weight_decay = self.D.no_weight_decay = True
        self.dt_bias.no_weight_decay = True

    def initial_state(self, batch_size):
        """Zero (conv state (B, d_inner + 2 N, K - 1), ssm state (B, H, P, N))."""
        convolved, _, width = self.conv1d.weight.shape
        new, heads = self.A_log.new_zeros, len(self.A_log)
        return (
            new(batch_size, convolved, width - 1),
            new(batch_size, heads, self.d_head, self.d_state),
        )

    def forward(self, x, lengths, state=None):
        """x (B, T, d_inner + 2 N + H): x, B, C, dt; lengths (B,) -> (B, T, d_inner), state.

        The state after each length; None when none is given.
        """
        conv_state, ssm_state = (None, None) if state is None else state
        x, dt = x.split([self.conv1d.in_channels, len(self.A_log)], dim=-1)
        x, conv_state = convolve(self.conv1d, x, lengths, self.reverse, conv_state)
        x, B, C = x.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        y, ssm_state = state_space_dual(
            x.unflatten(2, (-1, self.d_head)),
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            self.dt_bias,
            lengths=lengths,
            reverse=self.reverse,
            initial_state=ssm_state,
        )
        return y.flatten(2), None if state is None else (conv_state, ssm_state)


class Mamba2(nn.Module):
    """Causal state-space mixer: (B, T, D) -> (B, T, D), in pieces or at once.

    Arguments
    ---------
    d_model : int
        Channels in and out.
    d_state, expand, d_conv : int
        States a channel, inner channels per outer one, convolution width.
    d_head : int
        Channels that decay as one; it must divide expand * d_model (ValueError).
    """

    causal = True
    compile_options = INDUCTOR

    def __init__(self, d_model, d_state=64, expand=2, d_conv=4, d_head=32):
        super().__init__()
        d_inner, per_direction = sizes(d_model, d_state, expand, d_head)
        self.split = [d_inner, d_inner + per_direction]
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=False)
        self.ssm = DualSSM(d_inner, d_state, d_conv, d_head)
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def initial_state(self, batch_size):
        """The state before the first frame; pass it to `forward` to run in pieces."""
        return self.ssm.initial_state(batch_size)

    def forward(self, x, lengths, state=None):
        """x (B, T, D), lengths (B,) or None -> y (B, T, D) and the state after each length."""
        z, x = self.in_proj(x).split(self.split, dim=-1)
        y, state = self.ssm(x, lengths, state)
        return self.out_proj(normed(self.norm, y * nn.functional.silu(z))), state


class BiMamba2(nn.Module):
    """Bidirectional mixer: two state-space directions between shared projections.

    out = out_proj(norm(1/2 (y_forward + y_backward) silu(z))). The directions share x and z; each
    has its own B, C and dt, which come from the same product. Arguments as in `Mamba2`; chunks as
    in `modules.mamba.BiMamba`.
    """

    causal = False
    chunkable = True
    compile_options = INDUCTOR

    def __init__(self, d_model, d_state=64, expand=2, d_conv=4, d_head=32):
        super().__init__()
        d_inner, per_direction = sizes(d_model, d_state, expand, d_head)
        self.split = [d_inner, d_inner, per_direction, per_direction]
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=False)
        self.forward_ssm = DualSSM(d_inner, d_state, d_conv, d_head)
        self.backward_ssm = DualSSM(d_inner, d_state, d_conv, d_head, reverse=True)
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def initial_state(self, batch_size):
        """The state before the first chunk."""
        return self.forward_ssm.initial_state(batch_size)

    def forward(self, x, lengths, state=None, chunk=None):
        """x (B, T, D), lengths (B,) -> y (B, T - chunk.ahead, D), the state after each length."""
        z, x, *own = self.in_proj(x).split(self.split, dim=-1)
        inputs = [torch.cat([x, part], dim=-1) for part in own]
        directions = self.forward_ssm, self.backward_ssm
        if chunk is None:
            assert state is None, "BiMamba2 runs in pieces only if it is told the chunk"
            y = [ssm(x, lengths)[0] for ssm, x in zip(directions, inputs, strict=True)]
        else:
            y, state = run_in_chunks(*directions, *inputs, lengths, state, chunk)
        y = gated_mean(torch.stack(tuple(y)), z[:, : y[0].shape[1]])
        return self.out_proj(normed(self.norm, y)), state


def normed(norm, x):
    """A norm in its own precision, as autocast has it for LayerNorm but not for RMSNorm."""
    return norm(x.to(norm.weight.dtype))


def sizes(d_model, d_state, expand, d_head):
    """-> d_inner, and what a direction takes besides x: B, C and dt, 2 N + H channels."""
    d_inner = expand * d_model
    if d_inner % d_head:
        fitting = [n for n in range(1, d_inner + 1) if d_inner % n == 0 and n <= 128]
        raise ValueError(
            f"expand x d_model = {d_inner} is not divisible by d_head={d_head}; "
            f"use one of {fitting}"
        )
    return d_inner, 2 * d_state + d_inner // d_head
