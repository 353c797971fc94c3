"""One tensor for all layers that read it: cast once, and its gradients added in one pass.

Autocast casts it anew in each layer; each layer's gradient is cast back, and autograd adds them in
float32, two at a time. Of a decoder's memory of 32 x 400 frames and 512 channels six layers pass
0.87 GB a step in this way, and 0.14 GB in the other.
"""

import torch
from torch.autograd.function import once_differentiable


def add_up(tensors):
    """Tensors of one shape and precision -> their sum in float32.

    From the last to the first, as autograd adds what it gets from layers: the bits are the same.
    """
    *others, total = tensors
    total = total.float()
    for x in reversed(others):
        total = total + x
    return total


def hand_out(x, number, add=add_up):
    """x -> a tensor for each of so many readers, which use it in matrix products alone.

    Under autocast they are in its dtype, in which the products would take x anyway; elsewhere they
    are x itself.
    add: `add_up`, or the same compiled.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype != torch.float32:
        return (x,) * number
    return _HandOut.apply(x, torch.get_autocast_dtype(device), number, add)


class _HandOut(torch.autograd.Function):
    """Outputs in the same memory, each with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, dtype, number, add):
        ctx.set_materialize_grads(False)
        ctx.add = add
        copy = x.to(dtype)
        # Not as views, which are another kind of input to compiled layers.
        return tuple(copy.detach() for _ in range(number))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        given = [g for g in gradients if g is not None]
        if not given:
            return (None,) * 4
        # A recorded backward pass runs under autocast, another does not: TorchDynamo guards on it.
        with torch.autocast(given[0].device.type, enabled=False):
            return ctx.add(given), None, None, None
