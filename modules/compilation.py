"""torch.compile for the layers of an encoder or a decoder: one small graph serves all of them."""

import torch
from torch import nn

from modules.casting import with_weights_cast
from modules.dropout import draw_together
from modules.graphs import Graphs, TrainingGraphs
from modules.handing_out import add_up
from modules.prepared import Prepared

# Inductor's.
OPTIONS = {
    # It pads products whose sizes are no multiple of 8, where that is faster by its timing, and
    # gives the backward pass the padded strides of the first batch as those of all.
    "shape_padding": False,
    # LayerNorm's backward pass in one kernel that sums over both dimensions: at a width of 512 five
    # times as slow as in two.
    "triton.mix_order_reduction": False,
    # The sums over frames for LayerNorm's parameters, in the best of six shapes of
    # blocks by its timing: what it takes untried for sizes that it does not know reads eight
    # frames at a time, and waits for each eight before it asks for the next.
    "max_autotune_pointwise": True,
}


def compile_layers(network, backend="inductor"):
    """Compile the layers of an encoder, or of a decoder for teacher forcing.

    For batches of any size; what is compiled for one layer serves all. With the encoder's
    `gradient_checkpointing` a compiled layer keeps little (`modules.recomputation`) and makes the
    rest again in the backward pass, fused with what needs it. A search's `advance` stays as it is.
    backend: torch.compile's.
    """
    # With and without gradients, in each precision, for one utterance and for more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    if getattr(network, "gradient_checkpointing", False):
        network.gradient_checkpointing = False  # not once more around the layers
        for layer in network.layers:
            layer.recomputes = True
        # A module's float, dropout's probability, is an input of a graph of all sizes, and what
        # AOTAutograd (2.11) computes with it loses its mark of what to make again.
        torch._dynamo.config.specialize_float = True
    if next(network.parameters()).is_cuda:  # elsewhere dropout is PyTorch's
        draw_together(network)
    for layer in network.layers:
        mixer = getattr(layer, "mixer", None)
        options = OPTIONS | getattr(mixer, "compile_options", {})
        options = options if backend == "inductor" else None
        layer.compile(dynamic=True, backend=backend, options=options)
    if hasattr(network, "add_up"):  # a decoder's
        network.add_up = compile_sum(backend, OPTIONS if backend == "inductor" else None)


def compile_sum(backend, options):
    """`add_up` in one kernel, for any number of frames."""
    compiled = torch.compile(add_up, dynamic=True, backend=backend, options=options)

    def add(tensors):
        """Tensors (B, T, D) -> their sum (B, T, D)."""
        # D is a constant of the code, as in a layer: were it any number, elements would be read
        # one at a time and not eight.
        for x in tensors:
            torch._dynamo.mark_static(x, 2)
        return compiled(tensors)

    return add


def graphs_for(brain):
    """CUDA graphs of an `ASRBrain`'s training, or None, of its evaluation, and what that reads.

    Training has none with several processes, nor where chunks are drawn for each batch: a graph
    would repeat the size that it was recorded with.
    """
    modules, graphs = brain.modules, None
    if not brain.distributed_launch and modules.encoder.chunks is None:
        within = nn.ModuleList(m for name, m in modules.items() if not name.endswith("_head"))
        graphs = TrainingGraphs(
            with_weights_cast(brain.network, within),
            brain.hparams.model.parameters(),
        )
    layers = nn.ModuleList([modules.frontend, modules.encoder])
    prepared = Prepared(brain.layers, layers)
    return graphs, Graphs(prepared, before=prepared.refresh), prepared
