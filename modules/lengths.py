"""Lengths travel with sequences, in frames; these turn them into masks.

SpeechBrain's batches carry lengths relative to the longest member. They stop at the Brain:
`absolute` turns them into counts, `relative` turns counts back for SpeechBrain's own parts.
"""

import torch


def valid_frames(lengths, num_frames):
    """Mark the frames that belong to their utterance: lengths (B,) -> (B, T) bool."""
    return torch.arange(num_frames, device=lengths.device) < lengths.unsqueeze(1)


def zero_padding(x, lengths):
    """Set every frame past its utterance's length to zero, even NaN: (B, T, ...) -> same."""
    valid = valid_frames(lengths, x.shape[1])
    # Once over x; `masked_fill` copies it first.
    return torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, 0)


def absolute(relative_lengths, num_frames):
    """Relative lengths (B,) in (0, 1] -> counts (B,) int64."""
    return torch.round(relative_lengths * num_frames).long()


def relative(lengths, num_frames):
    """Counts (B,) -> lengths (B,) float32 relative to `num_frames`; `absolute` inverts it.

    Times `num_frames` they are never above the counts: SpeechBrain's masks would take one frame of
    padding for the utterance's, and its mean and variance with it, of one length in twenty.
    """
    counts = lengths.to(torch.float32)
    fractions = counts / max(num_frames, 1)
    # Times 1 - 2^-23 is the same number, but ONNX's optimiser takes that for times 1 and drops it.
    less = fractions - fractions * 2**-23
    return torch.where(fractions * num_frames > counts, less, fractions)
