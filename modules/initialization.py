"""The two initialisations of the published models, behind the key `initialization`."""

from torch import nn

from modules.mamba import BiMamba, Mamba

SCHEMES = ("mamba", "published")


def initialize(module, scheme):
    """Initialise an encoder or decoder in place.

    Both schemes give every parameter of more than one dimension Xavier normal values.
    "mamba" leaves Mamba's parameters as their own initialisation made them (A = -1..-N);
    "published" overwrites those too, A_log included, as the published recipe did (A ends
    between -1.3 and -0.8).

    Raises ValueError for another scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"initialization={scheme!r} is unknown; use one of {SCHEMES}")
    if scheme == "mamba" and isinstance(module, Mamba | BiMamba):
        return
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
    for child in module.children():
        initialize(child, scheme)
