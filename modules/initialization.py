"""The two initialisations of the published models, behind the key `initialization`."""

from torch import nn

from modules.mamba import SelectiveSSM
from modules.mamba2 import DualSSM

# What a state-space direction keeps of its own initialisation under each scheme.
KEPT = {
    "mamba": ("A_log", "dt_proj.weight", "conv1d.weight"),
    "published": (),
}


def initialize(module, scheme):
    """Initialise an encoder or decoder in place.

    Every scheme gives the parameters of more than one dimension Xavier normal values, except for
    what it keeps of Mamba's own initialisation (A = -1..-N, dt log-uniform in [0.001, 0.1],
    PyTorch's convolution). "published" keeps none of it, A_log included, as the published recipe
    did (A ends between -1.3 and -0.8).

    Raises ValueError for another scheme.
    """
    if scheme not in KEPT:
        raise ValueError(f"initialization={scheme!r} is unknown; use one of {tuple(KEPT)}")
    kept = {
        id(parameter)
        for ssm in module.modules()
        if isinstance(ssm, SelectiveSSM | DualSSM)
        for name, parameter in ssm.named_parameters()
        if name in KEPT[scheme]
    }
    for parameter in module.parameters():
        if parameter.dim() > 1 and id(parameter) not in kept:
            nn.init.xavier_normal_(parameter)
