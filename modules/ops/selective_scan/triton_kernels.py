# ruff: noqa: RUF005 - Triton knows tuples only to add them
"""Triton kernels of the selective scan: one program a (utterance, block of channels).

A program keeps its states (N, channels) in registers in float32 and walks along time in chunks, to
the utterance's own length. What it does is little arithmetic behind a long wait for memory, so the
inputs of the next chunk are loaded while the current one is computed.

d numbers channels, n states, t frames, k frames in the order of the scan. A comes multiplied by
log2(e), so that exp(dt A) is one exp2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 within 2e-7 of its value: 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    q = s * s
    # Chebyshev fit of artanh(s) / s on s <= 1/3, of relative error 2e-9.
    p = 0.112
    p = p * q + 0.1428
    p = p * q + 0.2
    p = p * q + 0.3333333
    return 2.0 * s * (p * q + 1.0)


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    """dt as projected -> the step, its derivative."""
    x = dt.to(tl.float32) + bias
    if SOFTPLUS:
        e = tl.exp2(-tl.abs(x) * LOG2E)
        sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        x = tl.maximum(x, 0.0) + log1p(e)
    else:
        sigmoid = x * 0.0 + 1.0
    return x, sigmoid


@triton.jit
def frame(k, length, REVERSE: tl.constexpr):
    """Position in time of the k-th frame of the scan, for pointers."""
    return tl.cast(length - 1 - k if REVERSE else k, tl.int64)


@triton.jit
def load_row(pointers, k, length, stride, mask, REVERSE: tl.constexpr):
    """The k-th frame's row of (T, channels or states); zero from the length on."""
    t = frame(k, length, REVERSE)
    return tl.load(pointers + t * stride, mask=mask & (k < length), other=0.0)


@triton.jit
def forward_row(
    u, dt, z, B, C, k, length, u_t, dt_t, z_t, B_t, C_t, d_mask, n_mask, REVERSE: tl.constexpr
):  # fmt: skip
    """u, dt, z, B, C of the k-th frame."""
    row_u = load_row(u, k, length, u_t, d_mask, REVERSE)
    row_dt = load_row(dt, k, length, dt_t, d_mask, REVERSE)
    row_B = load_row(B, k, length, B_t, n_mask, REVERSE)
    row_C = load_row(C, k, length, C_t, n_mask, REVERSE)
    row_z = row_u if z is None else load_row(z, k, length, z_t, d_mask, REVERSE)
    return row_u, row_dt, row_z, row_B, row_C


@triton.jit(do_not_specialize=["frames"])  # one build for every number of frames
def forward_kernel(
    u, dt, A, B, C, D, z, dt_bias, lengths, initial,
    y, final, starts,
    frames, channels, states,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """starts (B, chunks, N, D), if any, gets the state before every CHUNK frames."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N)
    d_mask = d < channels
    n_mask = n < states
    mask = n_mask[:, None] & d_mask[None, :]
    tile = n[:, None] * channels + d[None, :]  # in (N, D)

    length = frames
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), frames).to(tl.int32)
    A_tile = tl.load(A + tile, mask=mask, other=0.0)
    skip = tl.zeros([CHANNELS], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=d_mask, other=0.0).to(tl.float32)
    bias = tl.zeros([CHANNELS], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    h = tl.zeros([N, CHANNELS], tl.float32)
    if initial is not None:
        h = tl.load(initial + b * states * channels + tile, mask=mask, other=0.0)
    u += b * u_b + d
    dt += b * dt_b + d
    B += b * B_b + n
    C += b * C_b + n
    if z is not None:
        z += b * z_b + d
    y += b * frames * channels + d
    if starts is not None:
        starts += b * tl.cdiv(frames, CHUNK) * states * channels

    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + forward_row(
            u, dt, z, B, C, i, length, u_t, dt_t, z_t, B_t, C_t, d_mask, n_mask, REVERSE
        )  # fmt: skip
    for k in range(0, length, CHUNK):
        ahead = ()
        for i in tl.static_range(CHUNK):
            ahead = ahead + forward_row(
                u, dt, z, B, C, k + CHUNK + i, length, u_t, dt_t, z_t, B_t, C_t, d_mask, n_mask,
                REVERSE,
            )  # fmt: skip
        if starts is not None:
            tl.store(starts + tile, h, mask=mask)
            starts += states * channels
        for i in tl.static_range(CHUNK):
            u_k = rows[5 * i].to(tl.float32)
            step, _ = step_size(rows[5 * i + 1], bias, SOFTPLUS)
            step = tl.where(k + i < length, step, 0.0)
            B_k = rows[5 * i + 3].to(tl.float32)
            C_k = rows[5 * i + 4].to(tl.float32)
            h = tl.exp2(step[None, :] * A_tile) * h + (step * u_k)[None, :] * B_k[:, None]
            y_k = tl.sum(h * C_k[:, None], axis=0) + skip * u_k
            if z is not None:
                gate = rows[5 * i + 2].to(tl.float32)
                y_k *= gate / (1.0 + tl.exp2(-gate * LOG2E))
            t = frame(k + i, length, REVERSE)
            tl.store(y + t * channels, y_k.to(y.dtype.element_ty), mask=d_mask & (k + i < length))
        rows = ahead

    for t in range(length, frames):
        tl.store(
            y + tl.cast(t, tl.int64) * channels,
            tl.zeros([CHANNELS], y.dtype.element_ty),
            mask=d_mask,
        )
    tl.store(final + b * states * channels + tile, h, mask=mask)


@triton.jit
def backward_row(
    u, dt, z, dy, B, C, k, length, u_t, dt_t, z_t, dy_t, B_t, C_t, d_mask, n_mask,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """u, dt, z, dy, B, C of the k-th frame; zeros if k is negative or not below length."""
    d_mask &= k >= 0
    n_mask &= k >= 0
    row_u = load_row(u, k, length, u_t, d_mask, REVERSE)
    row_dt = load_row(dt, k, length, dt_t, d_mask, REVERSE)
    row_dy = load_row(dy, k, length, dy_t, d_mask, REVERSE)
    row_B = load_row(B, k, length, B_t, n_mask, REVERSE)
    row_C = load_row(C, k, length, C_t, n_mask, REVERSE)
    row_z = row_u if z is None else load_row(z, k, length, z_t, d_mask, REVERSE)
    return row_u, row_dt, row_z, row_dy, row_B, row_C


@triton.jit(do_not_specialize=["frames"])  # one build for every number of frames
def backward_kernel(
    u, dt, A, B, C, D, z, dt_bias, lengths, starts, dy, dfinal,
    du, ddt, dA, dBC, dD, dz, ddt_bias, dinitial,
    frames, channels, states,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Walk the chunks backwards; each is run forward from its start to have its states back.

    dA (B, N, D), dD and ddt_bias (B, D) are this utterance's; dBC (B, blocks, T, 2, N) is this
    block of channels' share. The caller sums them, always in the same order.
    """
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N)
    d_mask = d < channels
    n_mask = n < states
    mask = n_mask[:, None] & d_mask[None, :]
    tile = n[:, None] * channels + d[None, :]  # in (N, D)

    length = frames
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), frames).to(tl.int32)
    A_tile = tl.load(A + tile, mask=mask, other=0.0)
    skip = tl.zeros([CHANNELS], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=d_mask, other=0.0).to(tl.float32)
    bias = tl.zeros([CHANNELS], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + d, mask=d_mask, other=0.0).to(tl.float32)
    message = tl.zeros([N, CHANNELS], tl.float32)  # the gradient of the state after the chunk
    if dfinal is not None:
        message = tl.load(dfinal + b * states * channels + tile, mask=mask, other=0.0)
    dA_tile = tl.zeros([N, CHANNELS], tl.float32)
    dD_sum = tl.zeros([CHANNELS], tl.float32)
    ddt_sum = tl.zeros([CHANNELS], tl.float32)

    u += b * u_b + d
    dt += b * dt_b + d
    B += b * B_b + n
    C += b * C_b + n
    dy += b * dy_b + d
    du += b * frames * channels + d
    ddt += b * frames * channels + d
    if z is not None:
        z += b * z_b + d
        dz += b * frames * channels + d
    dBC += (b * tl.num_programs(0) + tl.program_id(0)) * frames * 2 * states + n
    starts += b * tl.cdiv(frames, CHUNK) * states * channels

    chunks = tl.cdiv(length, CHUNK)
    last = chunks - 1
    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + backward_row(
            u, dt, z, dy, B, C, last * CHUNK + i, length, u_t, dt_t, z_t, dy_t, B_t, C_t,
            d_mask, n_mask, REVERSE,
        )  # fmt: skip
    starts += tl.cast(last, tl.int64) * states * channels
    start = tl.load(starts + tile, mask=mask & (last >= 0), other=0.0)
    for j in range(0, chunks):
        k = (last - j) * CHUNK
        h = (start,)  # the states before and after each frame
        for i in tl.static_range(CHUNK):
            step, _ = step_size(rows[6 * i + 1], bias, SOFTPLUS)
            step = tl.where(k + i < length, step, 0.0)
            dt_u = step * rows[6 * i].to(tl.float32)
            B_k = rows[6 * i + 4].to(tl.float32)
            decay = tl.exp2(step[None, :] * A_tile)
            h = h + (decay * h[i] + dt_u[None, :] * B_k[:, None],)

        ahead = ()
        for i in tl.static_range(CHUNK - 1, -1, -1):
            ahead = ahead + backward_row(
                u, dt, z, dy, B, C, k - 1 - i, length, u_t, dt_t, z_t, dy_t, B_t, C_t,
                d_mask, n_mask, REVERSE,
            )  # fmt: skip
            if i == CHUNK // 2 - 1:
                starts -= states * channels
                start = tl.load(starts + tile, mask=mask & (k > 0), other=0.0)
            valid = k + i < length
            u_k = rows[6 * i].to(tl.float32)
            step, slope = step_size(rows[6 * i + 1], bias, SOFTPLUS)
            step = tl.where(valid, step, 0.0)
            dy_k = rows[6 * i + 3].to(tl.float32)
            B_k = rows[6 * i + 4].to(tl.float32)
            C_k = rows[6 * i + 5].to(tl.float32)
            t = frame(k + i, length, REVERSE)

            decay = tl.exp2(step[None, :] * A_tile)
            if z is not None:
                gate = rows[6 * i + 2].to(tl.float32)
                sigmoid = 1.0 / (1.0 + tl.exp2(-gate * LOG2E))
                silu = gate * sigmoid
                y_k = tl.sum(h[i + 1] * C_k[:, None], axis=0) + skip * u_k
                dz_k = dy_k * y_k * (sigmoid + silu * (1.0 - sigmoid))
                tl.store(dz + t * channels, dz_k.to(dz.dtype.element_ty), mask=d_mask & valid)
                dy_k *= silu

            dh = message + dy_k[None, :] * C_k[:, None]
            message = decay * dh
            dlog = message * h[i]  # of dt A
            dA_tile += dlog * step[None, :]
            ddt_u = tl.sum(dh * B_k[:, None], axis=0)
            # A is log2(e) times itself; ln(2) takes that back.
            ddt_k = tl.sum(dlog * A_tile, axis=0) * 0.6931471805599453 + ddt_u * u_k
            ddt_k = tl.where(valid, ddt_k * slope, 0.0)
            ddt_sum += ddt_k
            dD_sum += dy_k * u_k
            du_k = ddt_u * step + dy_k * skip
            tl.store(du + t * channels, du_k.to(du.dtype.element_ty), mask=d_mask & valid)
            tl.store(ddt + t * channels, ddt_k.to(ddt.dtype.element_ty), mask=d_mask & valid)
            dB_k = tl.sum(dh * (step * u_k)[None, :], axis=1)
            dC_k = tl.sum(h[i + 1] * dy_k[None, :], axis=1)
            tl.store(dBC + t * 2 * states, dB_k, mask=n_mask & valid)
            tl.store(dBC + t * 2 * states + states, dC_k, mask=n_mask & valid)
        rows = ahead

    zero_d = tl.zeros([CHANNELS], tl.float32)
    zero_n = tl.zeros([N], tl.float32)
    for tail in range(length, frames):
        t = tl.cast(tail, tl.int64)
        tl.store(du + t * channels, zero_d.to(du.dtype.element_ty), mask=d_mask)
        tl.store(ddt + t * channels, zero_d.to(ddt.dtype.element_ty), mask=d_mask)
        if z is not None:
            tl.store(dz + t * channels, zero_d.to(dz.dtype.element_ty), mask=d_mask)
        tl.store(dBC + t * 2 * states, zero_n, mask=n_mask)
        tl.store(dBC + t * 2 * states + states, zero_n, mask=n_mask)
    tl.store(dA + b * states * channels + tile, dA_tile, mask=mask)
    tl.store(dD + b * channels + d, dD_sum, mask=d_mask)
    tl.store(ddt_bias + b * channels + d, ddt_sum, mask=d_mask)
    if dinitial is not None:
        tl.store(dinitial + b * states * channels + tile, message, mask=mask)
