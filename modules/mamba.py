"""Mamba and BiMamba, the state-space mixers (Gu & Dao 2023, arXiv 2312.00752, section 3.4).

Names are the paper's: x the channels that go through the state space, z their gate, dt the step,
A, B, C, D the state-space matrices, N = d_state, K = d_conv, d_inner = expand * d_model.
"""

import math
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's name

from modules.ops.causal_conv1d import bidirectional_conv1d, causal_conv1d
from modules.ops.gating import gated_mean
from modules.ops.mamba_step import conv_step, scan_step
from modules.ops.selective_scan import bidirectional_scan, selective_scan


def dt_bias_of(channels, dt_min=1e-3, dt_max=0.1):
    """(channels,) whose softplus is log-uniform in [dt_min, dt_max]."""
    dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus


def convolve(conv1d, x, lengths, reverse, state, keep=True):
    """The convolution before a scan: x (B, T, D) -> y (B, T, D), the state after; None unless kept.

    conv1d: holds its weight and bias; state (B, D, K - 1) or None: before the first frame.
    """
    y = causal_conv1d(
        x,
        conv1d.weight.squeeze(1),
        conv1d.bias,
        activation="silu",
        lengths=lengths,
        reverse=reverse,
        initial_state=state,
        return_state=keep,
    )
    return y if keep else (y, None)


class SelectiveSSM(nn.Module):
    """One direction: causal convolution, input-dependent dt, B and C, selective scan.

    Arguments
    ---------
    d_inner, d_state, d_conv, dt_rank : int
        Channels, states a channel, convolution width, rank of the step's projection.
    reverse : bool
        Run from each utterance's last frame to its first.
    """

    def __init__(self, d_inner, d_state, d_conv, dt_rank, reverse=False):
        super().__init__()
        self.dt_rank, self.d_state, self.reverse = dt_rank, d_state, reverse
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.A_log.no_weight_decay = self.D.no_weight_decay = True
        self.dt_proj.bias.full_precision = True  # the scan adds it, no product
        self.reset_parameters()

    def reset_parameters(self, dt_min=1e-3, dt_max=0.1):
        """Mamba's own initialisation: A = -1..-N, D = 1, softplus(dt bias) in [dt_min, dt_max]."""
        with torch.no_grad():
            A = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype)
            self.A_log.copy_(A.log().expand_as(self.A_log))
            self.D.fill_(1.0)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(dt_bias_of(len(self.dt_proj.bias), dt_min, dt_max))

    def initial_state(self, batch_size):
        """Zero (conv state (B, d_inner, K - 1), ssm state (B, d_inner, N))."""
        d_inner, _, width = self.conv1d.weight.shape
        weight = self.A_log
        return (
            weight.new_zeros(batch_size, d_inner, width - 1),
            weight.new_zeros(batch_size, d_inner, self.d_state),
        )

    def forward(self, x, lengths, z=None, state=None):
        """x, z (B, T, d_inner), lengths (B,) -> (B, T, d_inner), the state after each length.

        The state returned is None when none is given. One frame without lengths, as in a search,
        takes `step`.
        """
        if state is not None and lengths is None and x.shape[1] == 1 and not self.reverse:
            y, state = self.step(x[:, 0], None if z is None else z[:, 0], state)
            return y.unsqueeze(1), state
        conv_state, ssm_state = (None, None) if state is None else state
        keep = state is not None
        x, conv_state = convolve(self.conv1d, x, lengths, self.reverse, conv_state, keep)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            lengths=lengths,
            reverse=self.reverse,
            initial_state=ssm_state,
            return_state=keep,
        )
        y, ssm_state = y if keep else (y, None)
        return y, ((conv_state, ssm_state) if keep else None)

    def step(self, x, z, state):
        """One frame, x and z (B, d_inner), state -> (B, d_inner), state: eq. 2a and 2b themselves.

        A search advances one frame at a time, and there a backend's call costs more than its sums.
        Numbers are those of `forward`: the state space is float32, float64 for float64 input.
        """
        conv_state, h = state
        x, conv_state = conv_step(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        y, h = scan_step(x, dt, self.A_log, B, C, self.D, z, self.dt_proj.bias, h)
        return y, (conv_state, h)


class Mamba(nn.Module):
    """Causal state-space mixer: (B, T, D) -> (B, T, D), in pieces or at once.

    Arguments
    ---------
    d_model : int
        Channels in and out.
    d_state, expand, d_conv : int
        States a channel, inner channels per outer one, convolution width.
    """

    causal = True

    def __init__(self, d_model, d_state=16, expand=2, d_conv=4):
        super().__init__()
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.ssm = SelectiveSSM(d_inner, d_state, d_conv, math.ceil(d_model / 16))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def initial_state(self, batch_size):
        """The state before the first frame; pass it to `forward` to run in pieces."""
        return self.ssm.initial_state(batch_size)

    def forward(self, x, lengths, state=None):
        """x (B, T, D), lengths (B,) or None -> y (B, T, D) and the state after each length.

        Without a state none is returned (None), and the faster stateless backends may run.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y, state = self.ssm(x, lengths, z=z, state=state)
        return self.out_proj(y), state


class Chunk(NamedTuple):
    """What a backward direction sees: `size` frames at a time, and `lookahead` after them.

    The last `ahead` frames of its input are there to be looked at alone.
    """

    size: int
    lookahead: int
    ahead: int = 0


class BothDirections(NamedTuple):
    """Parameters of two directions, stacked, as they are used.

    conv (2, d_inner, K), conv_bias (2, d_inner); to_inputs (2, R + 2 N, d_inner) of dt, B and C,
    to_steps (2, d_inner, R); A (2, d_inner, N), D (2, d_inner), dt_bias (2, d_inner). R is dt_rank,
    with zeros up to a multiple of eight, as tensor cores want it.
    """

    conv: torch.Tensor
    conv_bias: torch.Tensor
    to_inputs: torch.Tensor
    to_steps: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor


class BiMamba(nn.Module):
    """Bidirectional mixer: two state-space directions between shared projections.

    out = out_proj(1/2 (y_forward + y_backward) silu(z)), as both directions share the gate z.
    Arguments as in `Mamba`. Told a `Chunk`, it needs no more of the future than that, and runs
    chunk by chunk with the forward direction's state.
    """

    causal = False
    chunkable = True
    derived = None  # `derive` of before, see modules.prepared

    def __init__(self, d_model, d_state=16, expand=2, d_conv=4):
        super().__init__()
        d_inner, dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.forward_ssm = SelectiveSSM(d_inner, d_state, d_conv, dt_rank)
        self.backward_ssm = SelectiveSSM(d_inner, d_state, d_conv, dt_rank, reverse=True)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def initial_state(self, batch_size):
        """The state before the first chunk."""
        return self.forward_ssm.initial_state(batch_size)

    def forward(self, x, lengths, state=None, chunk=None):
        """x (B, T, D), lengths (B,) -> y (B, T - chunk.ahead, D), the state after each length.

        chunk: the backward direction begins anew for each `chunk.size` frames, the look-ahead
        after them; the forward direction runs through, from a state if one is given, and lengths
        may be None. None: both see whole utterances, and there is no state.
        """
        if chunk is not None:
            return self._chunked(x, lengths, state, chunk)
        assert state is None, "BiMamba runs in pieces only if it is told the chunk"
        both = self.derived or self.derive()
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, read = bidirectional_conv1d(x, both.conv, both.conv_bias, lengths, twice=True)
        states = self.forward_ssm.d_state
        parts = [both.to_steps.shape[2], states, states]
        dt, B, C = self._project(read, both.to_inputs).split(parts, dim=-1)
        y = bidirectional_scan(
            x,
            self._project(dt, both.to_steps),
            both.A,
            B,
            C,
            both.D,
            both.dt_bias,
            dt_softplus=True,
            lengths=lengths,
        )
        return self.out_proj(gated_mean(y, z)), None

    def _chunked(self, x, lengths, state, chunk):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y, state = run_in_chunks(self.forward_ssm, self.backward_ssm, x, x, lengths, state, chunk)
        return self.out_proj(gated_mean(torch.stack(y), z[:, : y[0].shape[1]])), state

    def derive(self):
        """-> BothDirections"""
        x_proj, dt_proj = self._both("x_proj.weight"), self._both("dt_proj.weight")
        rank = dt_proj.shape[2]
        spare = -rank % 8
        if spare:
            to_dt, to_rest = x_proj[:, :rank], x_proj[:, rank:]
            x_proj = torch.cat([F.pad(to_dt, (0, 0, 0, spare)), to_rest], dim=1)
            dt_proj = F.pad(dt_proj, (0, spare))
        return BothDirections(
            self._both("conv1d.weight").squeeze(2),
            self._both("conv1d.bias"),
            x_proj,
            dt_proj,
            -torch.exp(self._both("A_log")),
            self._both("D"),
            self._both("dt_proj.bias"),
        )

    def _project(self, x, weight):
        """x (2, B, T, D) by the weights (2, R, D) of its direction -> (2, B, T, R)."""
        if self.derived is None:
            y = torch.bmm(x.flatten(0, 1), for_each_utterance(weight, x))
        else:  # nothing is learnt
            y = torch.bmm(x.flatten(1, 2), weight.mT)
        return y.view(*x.shape[:3], weight.shape[1])

    def _both(self, name):
        """A parameter of both directions, stacked."""
        return torch.stack([*map(attrgetter(name), (self.forward_ssm, self.backward_ssm))])


def for_each_utterance(weight, x):
    """Weights (2, R, D) of both directions -> (2 B, D, R), for x (2, B, T, D).

    Their gradient is one small product an utterance, then, and a sum. Over all frames at once it
    has few numbers and a long way to each, which leaves most of a GPU without work.
    """
    return weight.transpose(1, 2).unsqueeze(1).expand(-1, x.shape[1], -1, -1).flatten(0, 1)


def run_in_chunks(forward, backward, x_forward, x_backward, lengths, state, chunk):
    """Both directions of a chunked mixer, each on what it is given of all T frames.

    x_forward, x_backward (B, T, X), lengths (B,) -> (y_forward, y_backward), each
    (B, T - chunk.ahead, D), and the forward direction's state.
    """
    frames = x_forward.shape[1] - chunk.ahead
    y_backward, _ = backward(*cut_windows(x_backward, lengths, chunk))
    batch = x_backward.shape[0]  # not `len`, which a tracer takes for a constant
    y_backward = y_backward[:, : chunk.size].unflatten(0, (batch, -1)).flatten(1, 2)
    lengths = None if lengths is None else lengths.clamp(max=frames)
    y_forward, state = forward(x_forward[:, :frames], lengths, state=state)
    return (y_forward, y_backward[:, :frames]), state


def cut_windows(x, lengths, chunk):
    """Put chunks side by side, each with its look-ahead: x (B, T, D), lengths (B,) -> windows.

    (B n, size + lookahead, D) and their lengths (B n,), which may be zero, for the n chunks of T.
    """
    size, lookahead, ahead = chunk
    count, further = max(1, -(-(x.shape[1] - ahead) // size)), -(-lookahead // size)
    if lengths is None:
        if count == 1:
            return x, None
        lengths = torch.full(x.shape[:1], x.shape[1], device=x.device)
    if torch.compiler.is_exporting():
        count += 1  # an empty one: torch.export would take a single one for a constant
    starts = torch.arange(count, device=x.device) * size
    lengths = (lengths.unsqueeze(1) - starts).clamp(0, size + lookahead).flatten()
    # Not by `unfold`, for which torch.compile would compile every size anew.
    chunks = F.pad(x, (0, 0, 0, (count + further) * size - x.shape[1]))
    chunks = chunks.unflatten(1, (count + further, size))
    windows = torch.cat([chunks[:, i : i + count] for i in range(further + 1)], dim=2)
    return windows[:, :, : size + lookahead].flatten(0, 1), lengths
