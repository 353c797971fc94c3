"""torch.export's own file, .pt2, for PyTorch without this project's code."""

import json

import torch

from inference.export.int8 import quantize_weights
from inference.export.program import program_of, quiet
from modules.ops.selective_scan import exporting

PACKAGES = ()
SUFFIX = ".pt2"
NAME = "mamba_asr.json"  # of the description, among the file's extra files


def convert(graph, inputs, path, int8, description):
    """Write a graph to a file -> run(*tensors), its outputs as the file computes them."""
    if int8:
        quantize_weights(graph)
    with exporting("scan"), quiet():
        program = program_of(graph, inputs)
        torch.export.save(program, path, extra_files={NAME: json.dumps(description)})
        return load(path)


def load(path):
    # Its guards refuse a batch of one for a chunked step, which computes it rightly.
    return torch.export.load(path).module(check_guards=False)
