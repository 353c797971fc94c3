"""What every operator checks of its arguments."""

import torch


def check_shapes(expected, **sources):
    """ValueError unless {name: (tensor or None, shape)} have these shapes, and lengths are whole.

    sources: name=(tensor, its axes in words), what the shapes follow from. The message is made
    when it is needed alone: made in a compiled layer, it would fix the layer to one length.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            of = [f"{n} {tuple(source.shape)} = {axes}" for n, (source, axes) in sources.items()]
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; expected {shape}, from {' and '.join(of)}"
            )
    lengths, _ = expected["lengths"]
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"lengths are {lengths.dtype}; expected integers, in frames")
