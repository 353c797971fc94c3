"""Gradient checkpointing of compiled code: what is kept for the backward pass, and what made again.

A compiler fuses what it makes again with what needs it, so that most of it costs little memory
traffic: norms, activations, dropout, gates and residual sums. Kept is what is small for its work.
"""

from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

aten = torch.ops.aten
# One frame after the other, of all operators the slowest; and one that gives a number a channel.
KEPT = {"mamba_asr::selective_scan", "mamba_asr::depthwise_conv1d"}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


def policy(_, operator, *args, **options):
    """Whether an operator's results are kept: create_selective_checkpoint_contexts asks."""
    kept = CheckpointPolicy.MUST_SAVE
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return kept  # drawn again, other weights would be dropped
    if operator.name() in KEPT:
        return kept
    if operator is aten.mean.dim:
        return kept  # of both directions' scans, and half as large
    if operator in PRODUCTS and is_short(*args[-2:]):
        return kept
    return CheckpointPolicy.PREFER_RECOMPUTE


def is_short(_, weight):
    """Whether a product (..., T, K) by (..., K, N) has rows at most twice as long as its input's.

    An element costs K multiply-adds to make again: of what widens, few. With a d_model of 512 and a
    d_ffn of 2048 the longer ones are seven tenths of what a ConMamba layer's products give, for
    half of their work.
    """
    # Here, where a compiler has it already: its import is half a second of every command's start.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    inner, outer = weight.shape[-2:]
    return statically_known_true(outer <= 2 * inner)  # sizes of a batch are not known


def recompute(function, *args):
    """function(*args), which keeps for its backward pass what `policy` says; to be compiled."""
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
