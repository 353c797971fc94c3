"""CoreML (ML Program, float32) by coremltools from a traced model; the scan goes by doubling.

coremltools converts everywhere and predicts on macOS alone, so what is compared with PyTorch is the
traced model, of which the file is a conversion.
"""

import json
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from inference.export.program import quiet
from inference.export.torchscript import traced
from modules.errors import UserError
from modules.ops.selective_scan import exporting

PACKAGES = ("coremltools",)
SUFFIX = ".mlpackage"
KEY = "mamba_asr"  # of the description in the file's metadata
LONGEST = 2048  # feature frames, about 20 s; the doublings of the scan are those of this length
BATCH = 16


class Int32(nn.Module):
    """A graph whose integers are int32, as CoreML has no longer ones."""

    def __init__(self, graph):
        super().__init__()
        self.whole = graph

    def forward(self, features, *integers_and_states):
        inputs = [x.long() if x.dtype == torch.int32 else x for x in integers_and_states]
        outputs = self.whole(features, *inputs)
        return tuple(x.int() if x.dtype == torch.int64 else x for x in outputs)


def convert(graph, inputs, path, int8, description):
    """Write a graph to a package -> run(*tensors), its outputs as the traced model gives them."""
    import coremltools as ct

    inputs = tuple(narrow(x) for x in long_enough(graph, inputs))
    with exporting("doubling"), quiet():
        model = traced(Int32(graph).eval(), inputs)
    batch = ct.RangeDim(1, BATCH, 2)
    time = ct.RangeDim(8, LONGEST, inputs[0].shape[1])
    shapes = [(batch, time, inputs[0].shape[2]), *((batch, *x.shape[1:]) for x in inputs[1:])]
    kinds = [np.int32 if x.dtype == torch.int32 else np.float32 for x in inputs]
    try:
        with quiet():
            mend_translations()
            converted = ct.convert(
                model,
                convert_to="mlprogram",
                inputs=[
                    ct.TensorType(name=name, shape=shape, dtype=kind)
                    for name, shape, kind in zip(graph.inputs, shapes, kinds, strict=True)
                ],
                outputs=[ct.TensorType(name=name) for name in graph.outputs],
                compute_precision=ct.precision.FLOAT32,
                minimum_deployment_target=ct.target.iOS17,
            )
            if int8:
                converted = quantized(converted)
            converted.user_defined_metadata[KEY] = json.dumps(description)
            converted.save(str(path))
    except Exception as error:  # coremltools' converters raise of all kinds
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"coremltools {version('coremltools')} cannot convert this model with torch "
            f"{torch.__version__}: {reason}; export to another target"
        ) from error
    return lambda *tensors: [widen(x) for x in model(*map(narrow, tensors))]


def long_enough(graph, inputs):
    """The example with LONGEST frames, so that the trace holds for all up to these."""
    features, lengths, *states = inputs
    features = features.repeat(1, -(-LONGEST // features.shape[1]), 1)[:, :LONGEST]
    return features, lengths * 0 + LONGEST - 3 * torch.arange(len(lengths)), *states


def narrow(x):
    return x.int() if x.dtype == torch.int64 else x


def widen(x):
    return x.long() if x.dtype == torch.int32 else x


def quantized(converted):
    """Weights as int8, a scale an output channel."""
    from coremltools.optimize import coreml

    options = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
    return coreml.linear_quantize_weights(
        converted, coreml.OptimizationConfig(global_config=options)
    )


def mend_translations():
    """Mend four of coremltools 9.0's translations, and add one.

    `clamp` and `//` of integers became floats, a weight that is flipped became an array with
    negative strides, which the next translation refuses, `unflatten` took no sizes that are free.
    """
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    from coremltools.converters.mil.mil import types

    clamp_of_floats, flip_of_data = ops.clamp, ops.flip

    def clamp(context, node):
        x, low, high = [*ops._get_inputs(context, node), None, None][:3]
        if types.is_float(x.dtype):
            return clamp_of_floats(context, node)
        x = x if low is None else mb.maximum(x=x, y=low)
        x = x if high is None else mb.minimum(x=x, y=high)
        return context.add(mb.identity(x=x, name=node.name))

    def floor_divide(context, node):
        x, y = ops._get_inputs(context, node, expected=2)
        context.add(mb.floor_div(x=x, y=y, name=node.name))

    def flip(context, node):
        x, axes = ops._get_inputs(context, node, expected=2)
        if x.val is None:
            return flip_of_data(context, node)
        flipped = np.ascontiguousarray(np.flip(x.val, tuple(axes.val)))
        return context.add(mb.const(val=flipped, name=node.name))

    def unflatten(context, node):
        x, axis, sizes = ops._get_inputs(context, node, expected=3)
        shape, axis = mb.shape(x=x), axis.val
        sizes = [mb.expand_dims(x=n, axes=[0]) for n in sizes]
        before = [mb.slice_by_size(x=shape, begin=[0], size=[axis])] if axis else []
        after = [mb.slice_by_size(x=shape, begin=[axis + 1], size=[x.rank - axis - 1])]
        shape = mb.concat(values=[*before, *sizes, *after], axis=0)
        context.add(mb.reshape(x=x, shape=shape, name=node.name))

    def view_as(context, node):
        x, other = ops._get_inputs(context, node, expected=2)
        context.add(mb.reshape(x=x, shape=mb.shape(x=other), name=node.name))

    for op in (clamp, floor_divide, flip, unflatten, view_as):
        register_torch_op(op, override=True)
