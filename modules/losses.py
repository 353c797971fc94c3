"""CTC on the columns that it needs, and the loss of the decoder; both take counts."""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from modules.lengths import valid_frames, zero_padding
from modules.ops.ctc import ctc, normalizers, scaled_softmax


def ctc_loss(logits, tokens, lengths, token_lengths, blank_index=0, reduction="batchmean"):
    """CTC (Graves et al. 2006), summed over each utterance and averaged over the batch.

    logits (B, T, V), tokens (B, U), lengths (B,) frames, token_lengths (B,) -> scalar, or with
    reduction "none" (B,). An utterance of `too_few_frames` counts zero. PyTorch has no CTC kernel
    for MPS, so there the loss is taken on the CPU.
    """
    device = logits.device
    if device.type == "mps":
        logits, tokens = logits.cpu(), tokens.cpu()
        lengths, token_lengths = lengths.cpu(), token_lengths.cpu()
    labels, columns, first, blank = ctc_columns(tokens, token_lengths, logits.shape[2], blank_index)
    loss = ColumnCTC.apply(logits, labels, lengths, token_lengths, columns, first, blank).to(device)
    return loss if reduction == "none" else loss.sum() / len(loss)


def ctc_columns(tokens, token_lengths, vocabulary, blank_index):
    """Choose the C columns of the logits that CTC looks at: blank and each utterance's tokens.

    tokens (B, U) -> labels (B, U), tokens by column; columns (B, C), their token ids; first
    (B, C), where each id stands first, for the label of equal tokens must be one; blank's label.
    """
    B, U = tokens.shape
    tokens = tokens.long().masked_fill(~valid_frames(token_lengths, U), blank_index)
    if vocabulary <= U + 1:
        columns = torch.arange(vocabulary, device=tokens.device).expand(B, vocabulary)
        return tokens, columns, columns, blank_index
    columns = F.pad(tokens, (1, 0), value=blank_index)
    equal = columns.unsqueeze(2) == columns.unsqueeze(1)
    first = equal.byte().argmax(dim=2)
    return first[:, 1:], columns, first, 0


class ColumnCTC(torch.autograd.Function):
    """CTC of each utterance, (B,), on the columns that it looks at.

    Elsewhere its gradient with respect to the logits is the softmax, which is written in their
    precision as it is computed: nothing of size (B, T, V) is kept in float32.
    """

    @staticmethod
    def forward(ctx, logits, labels, lengths, token_lengths, columns, first, blank):
        index = columns.unsqueeze(1).expand(-1, logits.shape[1], -1)
        whole = normalizers(logits)
        # Beside an infinite logit no column has a path, and what has no path counts zero.
        whole = whole.masked_fill(whole.isposinf(), math.nan)
        scores = logits.gather(2, index).to(whole.dtype) - whole.unsqueeze(2)
        valid = valid_frames(lengths, logits.shape[1])
        scores.masked_fill_(~valid.unsqueeze(2), 0.0)
        loss, grad = ctc(
            scores, labels, lengths, token_lengths, blank, needs_grad=ctx.needs_input_grad[0]
        )
        impossible = loss.isposinf()
        if grad is not None:
            # It needs no correction for the columns left out.
            grad = grad.gather(2, first.unsqueeze(1).expand_as(index))
            ctx.save_for_backward(logits, whole, columns, grad, valid & ~impossible.unsqueeze(1))
        return loss.masked_fill(impossible, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        logits, whole, columns, column_grad, counts = ctx.saved_tensors
        factors = grad_loss.to(whole.dtype).unsqueeze(1).masked_fill(~counts, 0.0)
        return scaled_softmax(logits, whole, factors, columns, column_grad), *[None] * 6


def consistency_loss(logits, lengths):
    """How far two views of each utterance are from each other (CR-CTC, Yao et al. 2024, eq. 5).

    logits (2 B, T, V), an utterance's views one after the other; lengths (2 B,) in frames ->
    scalar: the divergence of each view from the other one, which learns nothing from it, summed
    over frames and averaged over all.
    """
    logits = zero_padding(logits, lengths)  # so that there both are alike
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.log_softmax(dim=2, dtype=dtype).unflatten(0, (-1, 2))
    other = scores.flip(1).detach()
    return F.kl_div(scores, other, reduction="sum", log_target=True) / len(logits)


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

    log_probs (B, U, V), tokens (B, U), token_lengths (B,) -> scalar. It is SpeechBrain's
    `kldiv_loss`, to which token 0 is padding wherever it stands, and which has a distribution of V
    numbers for each token and passes a dozen times over as many; its `nll_loss` without smoothing.
    """
    scores = log_probs.flatten(0, 1)
    loss = F.nll_loss(scores, tokens.flatten().long(), reduction="none")
    if label_smoothing:
        # The distribution has two numbers: the token's, and that of each of the others.
        its, others = 1 - label_smoothing, label_smoothing / (log_probs.shape[2] - 1)
        least = label_smoothing * math.log(others) + (its and its * math.log(its))
        loss = (its - others) * loss - others * scores.sum(dim=1) + least
        loss = loss.masked_fill(tokens.flatten() == 0, 0.0)
    return zero_padding(loss.view_as(tokens), token_lengths).sum() / len(tokens)
