"""CTC and sequence losses: SpeechBrain's, fed with counts and kept off the ops that MPS lacks."""

import torch
from speechbrain.nnet import losses

from modules.lengths import relative, valid_frames


def ctc_loss(log_probs, tokens, lengths, token_lengths, blank_index=0):
    """CTC (Graves et al. 2006), summed over each utterance and averaged over the batch.

    log_probs (B, T, V), tokens (B, U), lengths (B,) frames, token_lengths (B,) -> scalar.
    An utterance of `too_few_frames` counts zero. PyTorch has no CTC kernel for MPS, so
    there the loss, a few thousand numbers, is taken on the CPU.
    """
    device = log_probs.device
    if device.type == "mps":
        log_probs, tokens = log_probs.cpu(), tokens.cpu()
        lengths, token_lengths = lengths.cpu(), token_lengths.cpu()
    if log_probs.dtype in (torch.float16, torch.bfloat16):
        log_probs = log_probs.float()
    loss = losses.ctc_loss(
        log_probs,
        tokens,
        relative(lengths, log_probs.shape[1]),
        relative(token_lengths, tokens.shape[1]),
        blank_index,
        reduction="batchmean",
    )
    return loss.to(device)


def too_few_frames(tokens, lengths, token_lengths):
    """Mark utterances that CTC cannot align: (B, U), frames (B,), (B,) -> (B,) bool.

    Every token takes a frame, and so does the blank between two equal ones.
    """
    repeated = (tokens[:, 1:] == tokens[:, :-1]) & valid_frames(
        token_lengths - 1, tokens.shape[1] - 1
    )
    return token_lengths + repeated.sum(1) > lengths


def sequence_loss(log_probs, tokens, token_lengths, label_smoothing=0.0):
    """Label-smoothed Kullback-Leibler divergence (Szegedy et al. 2016), as `ctc_loss` reduces.

    log_probs (B, U, V), tokens (B, U) with 0 as padding, token_lengths (B,) -> scalar.
    """
    # Half a token less: SpeechBrain compares positions with the product of a relative length
    # and U, which in float32 may pass the count by a rounding error and let a padded token in.
    lengths = (token_lengths.to(torch.float32) - 0.5) / tokens.shape[1]
    return losses.kldiv_loss(
        log_probs, tokens, length=lengths, label_smoothing=label_smoothing, reduction="batchmean"
    )
