"""torch.compile for the layers of a network: each small graph serves all that are alike."""

from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

CHEAP_SUM = 64  # products that sum over so few numbers are made again rather than kept


def compile_layers(*modules, backend="inductor"):
    """Compile the layers of an encoder and a decoder, and other modules whole.

    For batches of any size; what is compiled for one layer serves all that are like it. With an
    encoder's `gradient_checkpointing` a compiled layer keeps its larger matrix products alone, and
    makes the rest again in the backward pass, fused with what needs it.
    backend: torch.compile's.
    """
    # With and without gradients, in each precision, for one utterance and for more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for module in modules:
        for part in getattr(module, "layers", [module]):
            if getattr(module, "gradient_checkpointing", False):
                part.forward = partial(_keep_products, part.forward)
            part.compile(dynamic=True, backend=backend)
        module.gradient_checkpointing = False  # not once more around the layers


def _keep_products(forward, *args):
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


def _policy(context, operator, *args, **kwargs):
    """Whether an operator's result is kept for the backward pass."""
    aten = torch.ops.aten
    products = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}
    if operator in products and args[products[operator]].shape[-1] > CHEAP_SUM:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
