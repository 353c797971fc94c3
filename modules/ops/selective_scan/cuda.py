"""The selective scan by the CUDA kernel of the mamba-ssm package (Apache-2.0), if installed."""

import torch
from torch import nn

from modules.ops.backends import OK, Call, extension_availability
from modules.ops.padding import padding_mask

# Newer mamba-ssm may come without this kernel, hence the look at its compiled extension.
EXTENSION = "selective_scan_cuda"


def availability() -> str:
    return extension_availability(
        EXTENSION, "mamba_ssm", "pip install --no-build-isolation mamba-ssm (needs nvcc)"
    )


def supports(call: Call) -> str:
    if call.device != "cuda":
        return f"runs on cuda, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {call.dtype}"
    if call.width > 256:
        return f"holds at most 256 states, not {call.width}"
    if call.initial_state:
        return "cannot start from a given state"
    if call.return_state and call.needs_grad:
        return "gives no gradient from the returned state"
    return OK


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, lengths, reverse, initial_state, return_state
):
    """As `naive.selective_scan`, without an initial state."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    frames = u.shape[1]
    padding = padding_mask(lengths, frames)
    if not dt_softplus and dt_bias is not None:
        dt, dt_bias = dt + dt_bias, None
    if padding is not None:
        u, B, C = (x.masked_fill(padding, 0) for x in (u, B, C))
        z = None if z is None else z.masked_fill(padding, 0)
    # dt must be zero after the softplus on all frames that are not the utterance's. The kernel
    # applies it in float32, better than here in u's dtype; far below zero it gives exactly that.
    no_step = -1e4 if dt_softplus else 0.0
    if padding is not None:
        dt = dt.masked_fill(padding, no_step)

    def to_kernel(x, value=0.0):
        """(B, T, X) -> (B, X, T padded to the kernel's tile), in scan order and u's dtype"""
        x = x.to(u.dtype).transpose(1, 2)
        x = x.flip(-1) if reverse else x  # padding then comes first and leaves h at zero
        return nn.functional.pad(x, (0, padded_frames(frames) - frames), value=value).contiguous()

    with torch.autocast("cuda", enabled=False):
        result = selective_scan_fn(
            to_kernel(u),
            to_kernel(dt, no_step),
            A.float(),
            to_kernel(B),
            to_kernel(C),
            None if D is None else D.float(),
            None if z is None else to_kernel(z),
            None if dt_bias is None else dt_bias.float(),
            dt_softplus,
            return_state,
        )
    y, state = result if return_state else (result, None)
    y = y[..., :frames]
    y = (y.flip(-1) if reverse else y).transpose(1, 2)
    return y if padding is None else y.masked_fill(padding, 0), state


def padded_frames(frames: int) -> int:
    """Round up to the kernel's tile; other lengths take its path of 2-byte loads."""
    for tile in (128, 256, 512, 1024):
        if frames <= tile:
            return tile
    return -(-frames // 2048) * 2048
