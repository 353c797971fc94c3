"""Which frames of a right-padded batch are padding."""

import torch


def padding_mask(lengths: torch.Tensor | None, frames: int) -> torch.Tensor | None:
    """lengths (B,) in frames -> (B, T, 1), true on padded frames; None if there are no lengths."""
    if lengths is None:
        return None
    positions = torch.arange(frames, device=lengths.device)
    return (positions >= lengths[:, None])[:, :, None]
