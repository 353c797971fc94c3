"""ONNX, by PyTorch's dynamo exporter; the scan is ONNX's Scan. onnxruntime judges and runs it."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from inference.export.program import program_of, quiet
from inference.onnx.session import KEY, open_session
from modules.ops.selective_scan import exporting

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SUFFIX = ".onnx"


def convert(graph, inputs, path, int8, description):
    """Write a graph to a file -> run(*tensors), its outputs as the file computes them."""
    import onnx

    with exporting("scan"):
        program = program_of(graph, inputs)
    remove_idle_squeezes(program)
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
        )
    model = exported.model_proto
    if int8:
        model = quantized(model)
    forget_sources(model.graph)
    name_dimensions(model, graph)
    model.metadata_props.add(key=KEY, value=json.dumps(description))
    onnx.save(model, path)
    return load(path)


def load(path):
    """Run(*tensors) by onnxruntime."""
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]

    def run(*tensors):
        feed = dict(zip(names, (x.numpy() for x in tensors), strict=True))
        return [torch.from_numpy(np.asarray(x)) for x in session.run(None, feed)]

    return run


def remove_idle_squeezes(program):
    """Drop squeezes of dimensions that are not 1: PyTorch lets them be, ONNX refuses them."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        x, dim = node.args
        if x.meta["val"].shape[dim] != 1:
            node.replace_all_uses_with(x)
            graph.erase_node(node)
    program.graph_module.recompile()


def forget_sources(graph):
    """Drop what each node says of the code and the folders that it came from."""
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                forget_sources(attribute.g)


def quantized(model):
    """Weights of matrix products as int8, their inputs as int8 at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # onnxruntime has no kernel for both directions' products at once.
    stacked = {x.name for x in model.graph.initializer if len(x.dims) != 2}
    left = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in stacked]
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=left,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)


def name_dimensions(model, graph):
    """Call the free dimensions by their names."""
    names = {"features": ("batch", "time"), "log_probs": ("batch", "frames")}
    for value in (*model.graph.input, *model.graph.output):
        free = names.get(value.name, ("batch",))
        for dimension, name in zip(value.type.tensor_type.shape.dim, free, strict=False):
            dimension.dim_param = name
