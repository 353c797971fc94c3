"""A differentiable operator by kernels: in eager mode as it is, one node of torch.compile's graphs.

Neither TorchDynamo nor AOTAutograd looks into an operator: they know its schema, its gradient and
the shapes of its results, and leave the launching of kernels to it.
"""

import torch
from torch.autograd.function import once_differentiable


class Operator:
    """
    Arguments
    ---------
    name : str
    arguments : str
        PyTorch's schema of the arguments: "Tensor x, Tensor? lengths, bool reverse".
    outputs : int
        Tensors that `forward` returns.
    results : int
        The first of them, which have gradients; the others are kept for the backward pass.
    forward : callable
        forward(*arguments) -> a tuple of new tensors.
    backward : callable
        backward(gradients of the results (None for zero), arguments, kept) -> a list of new
        tensors: the gradient of every floating-point tensor among the arguments, dense, of its
        shape and dtype, in order.
    shapes : callable
        shapes(*arguments) -> as `forward`, of empty tensors.
    """

    def __init__(self, name, arguments, outputs, results, forward, backward, shapes):
        self.outputs, self.results = outputs, results
        self.forward, self.backward = forward, backward
        namespace, kinds = "mamba_asr", ", ".join(["Tensor"] * outputs)
        one = outputs == 1
        self.node = torch.library.custom_op(
            f"{namespace}::{name}",
            lambda *args: forward(*args)[0] if one else forward(*args),
            mutates_args=(),
            schema=f"({arguments}) -> " + (kinds if one else f"({kinds})"),
        )
        self.node.register_fake(lambda *args: shapes(*args)[0] if one else shapes(*args))
        self.backward_node = torch.library.custom_op(
            f"{namespace}::{name}_backward",
            lambda gradients, kept, *args: backward(gradients, args, kept),
            mutates_args=(),
            schema=f"(Tensor?[] gradients, Tensor[] kept, {arguments}) -> Tensor[]",
        )
        self.backward_node.register_fake(
            lambda gradients, kept, *args: [
                torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in args if _learns(x)
            ]
        )
        self.node.register_autograd(self._differentiate, setup_context=self._remember)

    def __call__(self, *args):
        """A tuple of all outputs."""
        if not torch.compiler.is_compiling():
            return _Eager.apply(self, *args)
        outputs = self.node(*args)
        return (outputs,) if self.outputs == 1 else outputs

    def differentiate(self, gradients, kept, args):
        """What `backward` gives, for an autograd.Function around the operator."""
        if torch.compiler.is_compiling():
            return self.backward_node(gradients, kept, *args)
        return self.backward(gradients, args, kept)

    def _remember(self, ctx, inputs, output):
        outputs = (output,) if self.outputs == 1 else output
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *outputs[self.results :])
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def _recall(self, ctx):
        saved = list(ctx.saved_tensors)
        args = [saved.pop(0) if other is None else other[0] for other in ctx.others]
        return args, saved

    def _differentiate(self, ctx, *gradients):
        args, kept = self._recall(ctx)
        given = self.backward_node(list(gradients[: self.results]), kept, *args)
        return self._in_place(args, given)

    def _in_place(self, args, gradients):
        gradients = iter(gradients)
        return tuple(next(gradients) if _learns(x) else None for x in args)


class _Eager(torch.autograd.Function):
    """An operator outside a compiled graph: no dispatch between it and its kernels."""

    @staticmethod
    def forward(ctx, operator, *args):
        outputs = operator.forward(*args)
        ctx.operator = operator
        ctx.mark_non_differentiable(*outputs[operator.results :])
        operator._remember(ctx, args, outputs if operator.outputs > 1 else outputs[0])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        operator = ctx.operator
        args, kept = operator._recall(ctx)
        given = operator.backward(gradients[: operator.results], args, kept)
        return None, *operator._in_place(args, given)


def _learns(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()
