"""TorchScript, for C++ and mobile runtimes that know nothing newer (PyTorch calls it legacy)."""

import json

import torch

from inference.export.int8 import quantize_weights
from inference.export.program import quiet
from modules.ops import causal_conv1d
from modules.ops.selective_scan import exporting

PACKAGES = ()
SUFFIX = ".ts"
NAME = "mamba_asr.json"  # of the description, among the file's extra files


def convert(graph, inputs, path, int8, description):
    """Write a graph to a file -> run(*tensors), its outputs as the file computes them."""
    if int8:
        quantize_weights(graph)
    with exporting("scripted"), quiet():
        torch.jit.save(traced(graph, inputs), path, {NAME: json.dumps(description)})
        return load(path)


def load(path):
    return torch.jit.load(path)


@torch.no_grad()
def traced(graph, inputs):
    """nn.Module and example inputs -> ScriptModule."""
    with causal_conv1d.exporting("torch"):
        return torch.jit.trace(graph, inputs, check_trace=False)
