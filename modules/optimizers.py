"""What an optimizer is given: which parameters decay, and one gradient norm for all of them."""

import inspect
from functools import partial

import torch
from torch import nn

# The frontend's LayerNorm runs over bins and channels: its weight has two dimensions.
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(modules, weight_decay, everything=False):
    """Yield two groups for a torch optimizer: the parameters that decay, then those that do not.

    Norms, biases, whatever has less than two dimensions and parameters that carry
    `no_weight_decay` (A_log and D) do not, unless `everything` is to, as in the published code.
    Every trainable parameter of `modules` (a Module) is in one group, once, in the order of
    `modules.parameters()`.
    """
    spared = {
        parameter
        for module in modules.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() < 2
        or "bias" in name
        or isinstance(module, NORMS)
        or getattr(parameter, "no_weight_decay", False)
    }
    trainable = [p for p in modules.parameters() if p.requires_grad]
    others = weight_decay if everything else 0.0
    yield {"params": [p for p in trainable if p not in spared], "weight_decay": weight_decay}
    yield {"params": [p for p in trainable if p in spared], "weight_decay": others}


def fused(opt_class, device, scaler):
    """A torch optimizer's class or partial, on CUDA devices by its fused kernels if it has any.

    Not in fp16: there a hook of every step would run in the skipped steps as well.
    """
    if torch.device(device).type != "cuda" or scaler.is_enabled():
        return opt_class
    if "fused" not in inspect.signature(opt_class).parameters:
        return opt_class
    return partial(opt_class, fused=True)


def gradients_of(optimizer):
    """The gradients of all its groups; a parameter without one is left out."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in parameters if p.grad is not None]


def clip(gradients, norm, max_norm):
    """Scale gradients, of `norm` together, to `max_norm` if they have more; 0 is no limit.

    As `torch.nn.utils.clip_grad_norm_`, with a norm that is known.
    """
    if max_norm > 0 and gradients:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)


def advance_before_steps(schedule, optimizer):
    """Advance a learning rate schedule before every step, so that warm-up begins with the first.

    A step that is not taken, for numbers that are not finite, does not advance it. Returns the
    handle that removes the hook.
    """

    def advance(optimizer, args, kwargs):
        schedule(optimizer)  # what it returns is not for the optimizer

    return optimizer.register_step_pre_hook(advance)
