"""The weights of matrix products in autocast's dtype, cast all at once.

Autocast casts each weight where it is used: a launch of a few microseconds each, 250 and more a
step, and in the backward pass as many for the gradients. A recorded step repeats them all.
"""

import copy
import functools
import itertools

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.stateless import _reparametrize_module


def with_weights_cast(network, modules):
    """A function like `network`, which under autocast finds modules' weights cast already.

    Numbers are autocast's own, with its cache: a weight used twice has the sum of its gradients
    rounded to that dtype. What leaves autocast inside, with `enabled=False`, finds them cast too:
    its parameters want an attribute `full_precision` that is true.
    modules: nn.Module whose submodules the network calls, and no others.
    """
    names = [name for name, _ in weights_of_products(modules)]

    @functools.wraps(network)
    def run(*inputs, **options):
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return network(*inputs, **options)
        weights = [modules.get_parameter(name) for name in names]
        copies = _Cast.apply(torch.get_autocast_dtype(device), *weights)
        with _reparametrize_module(modules, dict(zip(names, copies, strict=True))):
            return network(*inputs, **options)

    return run


def weights_of_products(modules):
    """The (name, parameter) pairs that only matrix products and 2-D convolutions use.

    All others, of norms, of depthwise convolutions and of the state space, stay in their precision.
    """
    for prefix, module in modules.named_modules():
        product = isinstance(module, nn.Linear | nn.Conv2d)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            attention = name.endswith(("in_proj_weight", "in_proj_bias"))
            if (product or attention) and not getattr(parameter, "full_precision", False):
                yield name, parameter


def copy_cast(modules, dtype):
    """A copy of modules with weights of products in a dtype, which it shares all others with.

    None: it shares all. -> the copy, its own weights, yet to be written, and those they stand for.
    """
    weights = [] if dtype is None else [weight for _, weight in weights_of_products(modules)]
    copies = [nn.Parameter(torch.empty_like(w, dtype=dtype), requires_grad=False) for w in weights]
    shared = {id(x): x for x in itertools.chain(modules.parameters(), modules.buffers())}
    own = {id(weight): low for weight, low in zip(weights, copies, strict=True)}
    return copy.deepcopy(modules, shared | own), copies, weights


def sources_of_gradients(outputs, parameters):
    """With respect to what to differentiate outputs to learn parameters' gradients: a list.

    Where a parameter's whole gradient comes through its one copy in another dtype, that is the
    copy, which has the same gradient before it is made as long as the parameter; else the
    parameter.
    """
    uses, seen, nodes = {}, set(), [y.grad_fn for y in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for i, (following, _) in enumerate(node.next_functions):
            parameter = getattr(following, "variable", None)  # of a leaf
            if parameter is None:
                nodes.append(following)
            else:
                uses.setdefault(parameter, []).append((node, i))

    def source(parameter):
        found = uses.get(parameter, ())
        if len(found) == 1 and isinstance(found[0][0], _Cast._backward_cls):
            return GradientEdge(*found[0])
        return parameter

    return [source(parameter) for parameter in parameters]


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, and their gradients back, in few launches."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype for x in tensors]
        copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
        torch._foreach_copy_(copies, list(tensors))
        # Of frozen weights: what is before them would need a gradient too.
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(y for y, w in zip(copies, wanted, strict=True) if not w))
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        whole = [
            None if g is None else torch.empty_like(g, dtype=dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        given = [(w, g) for w, g in zip(whole, gradients, strict=True) if g is not None]
        if given:
            torch._foreach_copy_(*map(list, zip(*given, strict=True)))
        return (None, *whole)
