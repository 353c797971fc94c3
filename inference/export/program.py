"""A graph traced by torch.export, batch and time free."""

import contextlib
import io
import logging
import warnings

import torch

from modules.ops import causal_conv1d


@torch.no_grad()
def program_of(graph, inputs):
    """nn.Module and example inputs -> ExportedProgram.

    Under no_grad, and of weights that ask for no gradient, for the scan operator.
    """
    batch, time = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = [{0: batch, 1: time}, *({0: batch} for _ in inputs[1:])]
    states = tuple(shapes[2:])
    with causal_conv1d.exporting("torch"):
        return torch.export.export(
            graph,
            inputs,
            dynamic_shapes=(*shapes[:2], states) if states else tuple(shapes),
        )


@contextlib.contextmanager
def quiet():
    """Keep exporters from telling of their steps; what fails is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
