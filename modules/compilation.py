"""torch.compile for the layers of a network: each small graph serves all that are alike."""

import torch
import torch._inductor.config


def compile_layers(*modules, backend="inductor"):
    """Compile the layers of an encoder and a decoder.

    For batches of any size; what is compiled for one layer serves all that are like it. With an
    encoder's `gradient_checkpointing` a compiled layer keeps what its matrix products gave, and
    makes the rest again in the backward pass, fused with what needs it.
    backend: torch.compile's.
    """
    # With and without gradients, in each precision, for one utterance and for more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Inductor draws one random number where PyTorch's dropout draws four in the same time.
    torch._inductor.config.fallback_random = True
    for module in modules:
        if getattr(module, "gradient_checkpointing", False):
            # To PyTorch all but products is free to make again, which anything below 1 allows.
            torch._functorch.config.activation_memory_budget = 0.99
            module.gradient_checkpointing = False  # not once more around the layers
        for layer in module.layers:
            layer.compile(dynamic=True, backend=backend)
