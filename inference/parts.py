"""A package's configuration, plain data, to the objects it names; only classes listed here.

An object is `{"new": class, argument: value, ...}`, a function that makes objects
`{"factory": class, ...}`, a part named earlier `{"part": name}`. Everything else is a value.
"""

from functools import partial

import torch
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.dynamic_chunk_training import (
    DynChunkTrainConfig,
    DynChunkTrainConfigRandomSampler,
)

from modules.attention import RelPosAttention, RoPEAttention
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.errors import UserError
from modules.features import Features
from modules.frontend import ConvFrontend
from modules.lm.mamba_lm import MambaLM
from modules.mamba import BiMamba, Mamba
from modules.mamba2 import BiMamba2, Mamba2
from modules.search import CTCSearch, JointBeamSearch
from modules.tokenizer import CharacterTokenizer, SubwordTokenizer
from modules.two_mambas import TwoMambas

FORMAT = 1  # of config.json; another number is refused
LARGEST = 1 << 20  # a whole number in a configuration
# What classes raise for arguments that do not fit, memory that is not there included.
WRONG = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError)
MODEL = ("frontend", "encoder", "ctc_head", "decoder", "seq_head")  # the parts with weights

# A name that is not here is refused, so a package cannot make Python import or call anything else.
CLASSES = {
    "modules.features.Features": Features,
    "speechbrain.processing.features.InputNormalization": InputNormalization,
    "modules.frontend.ConvFrontend": ConvFrontend,
    "modules.encoder.Encoder": Encoder,
    "modules.mamba.BiMamba": BiMamba,
    "modules.mamba.Mamba": Mamba,
    "modules.mamba2.BiMamba2": BiMamba2,
    "modules.mamba2.Mamba2": Mamba2,
    "modules.two_mambas.TwoMambas": TwoMambas,
    "modules.attention.RelPosAttention": RelPosAttention,
    "modules.attention.RoPEAttention": RoPEAttention,
    "modules.decoder.Decoder": Decoder,
    "modules.decoder.MambaDecoderLayer": MambaDecoderLayer,
    "modules.decoder.TransformerDecoderLayer": TransformerDecoderLayer,
    "modules.tokenizer.CharacterTokenizer": CharacterTokenizer,
    "modules.tokenizer.SubwordTokenizer": SubwordTokenizer,
    "modules.search.CTCSearch": CTCSearch,
    "modules.search.JointBeamSearch": JointBeamSearch,
    "speechbrain.lobes.models.transformer.TransformerLM.TransformerLM": TransformerLM,
    "modules.lm.mamba_lm.MambaLM": MambaLM,
    "speechbrain.utils.dynamic_chunk_training.DynChunkTrainConfig": DynChunkTrainConfig,
    "speechbrain.utils.dynamic_chunk_training.DynChunkTrainConfigRandomSampler": (
        DynChunkTrainConfigRandomSampler
    ),
    "torch.nn.Linear": torch.nn.Linear,
    "torch.nn.GELU": torch.nn.GELU,
    "torch.nn.ReLU": torch.nn.ReLU,
    "torch.nn.SiLU": torch.nn.SiLU,
    "torch.nn.Tanh": torch.nn.Tanh,
}


def build_parts(config):
    """{name: node} -> {name: object}, in order. UserError for a class or argument unknown here."""
    parts = {}
    for name, node in config.items():
        try:
            parts[name] = build(node, parts)
        except (*WRONG, MemoryError) as error:
            raise UserError(f"the part {name!r} cannot be made: {error}") from None
    return parts


def build(node, parts):
    """One node -> a value, an object, or a function that makes objects."""
    if isinstance(node, list):
        return [build(n, parts) for n in node]
    if not isinstance(node, dict):
        if isinstance(node, int) and abs(node) > LARGEST:
            raise UserError(f"{node} is larger than any size or rate of a model here; correct it")
        return node
    kind = next(iter(node.keys() & {"new", "factory", "part"}), None)
    if kind is None:
        return {key: build(value, parts) for key, value in node.items()}
    name = node[kind]
    if kind == "part":
        if name not in parts:
            raise UserError(f"the part {name!r} is used before it is made; package again")
        return parts[name]
    if name not in CLASSES:
        raise UserError(
            f"{name!r} is not a class that a package may name; known are {', '.join(CLASSES)}"
        )
    arguments = {key: build(value, parts) for key, value in node.items() if key != kind}
    return CLASSES[name](**arguments) if kind == "new" else partial(CLASSES[name], **arguments)
