"""Linear layers whose weights are stored as int8, a scale an output channel; they compute in float.

For graphs of PyTorch; ONNX and CoreML have their own tools.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from modules.mamba import SelectiveSSM


class Scaled(nn.Module):
    """int8 weight (out, in) -> float32."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight):
        return weight.to(self.scale.dtype) * self.scale


def quantize_weights(model):
    """Round the linear layers' weights, in place; the small ones within a scan stay."""
    scans = [m for m in model.modules() if isinstance(m, SelectiveSSM)]
    within = {m for scan in scans for m in scan.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in within]
    for module in linear:
        weight = module.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        rounded = torch.round(weight / scale).to(torch.int8)
        module.weight = nn.Parameter(rounded, requires_grad=False)
        parametrize.register_parametrization(module, "weight", Scaled(scale), unsafe=True)
