"""Weights of the published ConMamba code (arXiv 2407.09732), under this project's names.

`from_upstream` builds a model from a configuration and a state dict; `modules.convert` converts a
whole checkpoint folder.
"""

import re
from functools import partial

import torch
from torch import nn

from modules.attention import RelPosAttention, RoPEAttention
from modules.decoder import Decoder, MambaDecoderLayer, TransformerDecoderLayer
from modules.encoder import Encoder
from modules.errors import UserError
from modules.mamba import BiMamba, Mamba
from modules.tensors import misfits

# Position tables: computed here, stored there.
IGNORED = re.compile(r"positional_encoding\.inv_freq|positional_encoding_decoder\.pe")

# (their name, ours), first match wins; groups carry layer numbers and the rest of the name.
RENAMES = [
    (r"custom_src_module\.layers\.0\.w\.(.*)", r"encoder.input_layer.0.\1"),
    (r"custom_tgt_module\.layers\.0\.emb\.Embedding\.weight", r"decoder.embedding.weight"),
    (r"(encoder|decoder)\.norm\.norm\.(.*)", r"\1.norm.\2"),
    (r"(encoder\.layers\.\d+\.ffn)_module([12])\.0\.(.*)", r"\1\2_norm.\3"),
    (r"(encoder\.layers\.\d+\.ffn)_module([12])\.1\.ffn\.(.*)", r"\1\2.\3"),
    (r"(encoder\.layers\.\d+)\.norm1\.norm\.(.*)", r"\1.mixer_norm.\2"),
    (r"(encoder\.layers\.\d+)\.norm2\.norm\.(.*)", r"\1.out_norm.\2"),
    (r"(encoder\.layers\.\d+)\.convolution_module\.layer_norm\.(.*)", r"\1.conv.norm.\2"),
    (
        r"(encoder\.layers\.\d+)\.convolution_module\.bottleneck\.0\.(.*)",
        r"\1.conv.pointwise_in.\2",
    ),
    (r"(encoder\.layers\.\d+)\.convolution_module\.conv\.(.*)", r"\1.conv.depthwise.\2"),
    (r"(encoder\.layers\.\d+)\.convolution_module\.after_conv\.0\.(.*)", r"\1.conv.out_norm.\2"),
    (
        r"(encoder\.layers\.\d+)\.convolution_module\.after_conv\.2\.(.*)",
        r"\1.conv.pointwise_out.\2",
    ),
    (r"(encoder\.layers\.\d+)\.mha_layer\.(.*)", r"\1.mixer.\2"),
    (r"(encoder\.layers\.\d+)\.mamba\.(.*)", r"\1.mixer.\2"),
    (r"(decoder\.layers\.\d+)\.norm1\.norm\.(.*)", r"\1.self_norm.\2"),
    (r"(decoder\.layers\.\d+)\.norm2\.norm\.(.*)", r"\1.cross_norm.\2"),
    (r"(decoder\.layers\.\d+)\.norm3\.norm\.(.*)", r"\1.ffn_norm.\2"),
    (r"(decoder\.layers\.\d+)\.pos_ffn\.ffn\.(.*)", r"\1.ffn.\2"),
    (r"(decoder\.layers\.\d+)\.self_attn\.att\.(.*)", r"\1.self_attention.\2"),
    (r"(decoder\.layers\.\d+)\.multihead_attn\.att\.(.*)", r"\1.cross_attention.\2"),
    (r"(decoder\.layers\.\d+\.(?:self|cross)_mamba\..*)", r"\1"),
]

# Inside a Mamba: the projections in and out are shared, the rest belongs to a direction.
BACKWARD = {"A_b_log": "A_log", "D_b": "D"}


def rename(key, bidirectional):
    """The published name of an encoder or decoder parameter -> ours; UserError when unknown."""
    for theirs, ours in RENAMES:
        match = re.fullmatch(theirs, key)
        if match:
            return rename_ssm(match.expand(ours), bidirectional)
    raise UserError(
        f"unexpected weight {key!r}: no part of a published ConMamba or Conformer has this name; "
        "check that the checkpoint is of that code and whole"
    )


def rename_ssm(key, bidirectional):
    """Name the direction that a state-space parameter belongs to."""
    match = re.fullmatch(r"(.*\.(?:mixer|self_mamba|cross_mamba))\.(.*)", key)
    if match is None or re.match(r"in_proj|out_proj|pos_|linear_pos|attention", match[2]):
        return key
    owner, name = match.groups()
    if not (bidirectional and owner.endswith("mixer")):
        return f"{owner}.ssm.{name}"
    head, _, rest = name.partition(".")
    if head in BACKWARD or head.endswith("_b"):
        name = BACKWARD.get(head, head.removesuffix("_b")) + (f".{rest}" if rest else "")
        return f"{owner}.backward_ssm.{name}"
    return f"{owner}.forward_ssm.{name}"


def reshape(key, weight):
    """Their pointwise convolution (2 D, D, 1) is our linear; their (D/H, H) bias our (H, D/H)."""
    if key.endswith("conv.pointwise_in.weight") and weight.dim() == 3:
        return weight.squeeze(-1)
    if key.endswith(("pos_bias_u", "pos_bias_v")):
        return weight.reshape(weight.shape[1], weight.shape[0])
    return weight


def convert(state_dict, bidirectional):
    """A published state dict -> ours, tensor by tensor; UserError for a name we do not know."""
    converted = {}
    for key, weight in state_dict.items():
        if not IGNORED.fullmatch(key):
            ours = rename(key, bidirectional)
            converted[ours] = reshape(ours, weight)
    return converted


def load_strictly(module, state_dict):
    """Load converted weights; UserError naming every missing, unexpected or misshapen one."""
    if lines := misfits(module, state_dict, "the configuration"):
        raise UserError(
            f"the weights do not fit the configuration:\n{lines}\n"
            "use the configuration that the checkpoint was trained with"
        )
    module.load_state_dict(state_dict)


class UpstreamModel(nn.Module):
    """Encoder and, for S2S, decoder with published weights; the frontend stays outside."""

    def __init__(self, encoder, decoder=None):
        super().__init__()
        self.encoder = encoder
        if decoder is not None:
            self.decoder = decoder

    def encode(self, src, lengths):
        """Frontend output (B, T, input_size), lengths (B,) -> (B, T, D), lengths."""
        return self.encoder(src, lengths)

    def decode(self, tokens, memory, lengths):
        """tokens (B, U), memory (B, T, D) valid to lengths (B,) -> (B, U, D).

        Decoders are causal, so tokens after an utterance's last change nothing before it.
        """
        num_tokens = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        return self.decoder(tokens, num_tokens, memory, lengths)[0]


def make_mixer(config):
    """The mixer factory that a published configuration names."""
    if config["encoder_module"] == "conmamba":
        mamba = dict(config["mamba_config"])
        kind = BiMamba if mamba.pop("bidirectional", True) and not config["causal"] else Mamba
        return partial(kind, **mamba)
    if config["encoder_module"] == "conformer":
        kinds = {"RelPosMHAXL": RelPosAttention, "RoPEMHA": RoPEAttention}
        if config["attention_type"] in kinds:
            return partial(
                kinds[config["attention_type"]],
                num_heads=config["nhead"],
                dropout=config["dropout"],
            )
        raise UserError(
            f"attention_type={config['attention_type']!r} is not supported; use one of "
            f"{sorted(kinds)}"
        )
    raise UserError(
        f"encoder_module={config['encoder_module']!r} is not supported; use conmamba or conformer"
    )


def make_decoder(config, activation):
    """The decoder that a published configuration names, or None."""
    if not config["num_decoder_layers"]:
        return None
    if config["decoder_module"] == "mamba":
        mamba = {k: v for k, v in config["mamba_config"].items() if k != "bidirectional"}
        layer = partial(MambaDecoderLayer, **mamba)
    elif config["decoder_module"] == "transformer":
        layer = partial(TransformerDecoderLayer, num_heads=config["nhead"])
    else:
        raise UserError(
            f"decoder_module={config['decoder_module']!r} is not supported; use mamba or "
            "transformer"
        )
    return Decoder(
        config["tgt_vocab"],
        config["d_model"],
        config["d_ffn"],
        config["num_decoder_layers"],
        partial(layer, activation=activation, dropout=config["dropout"]),
    )


REQUIRED = [
    *("input_size", "tgt_vocab", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers"),
    *("d_ffn", "dropout", "activation", "kernel_size", "encoder_module", "attention_type"),
    *("causal", "decoder_module", "mamba_config"),
]


def from_upstream(config, state_dict):
    """Build our model with weights of the published code.

    Arguments
    ---------
    config : dict
        The published constructor's values, named as in REQUIRED.
    state_dict : dict of str to Tensor
        Weights under the published names.

    Returns
    -------
    UpstreamModel in evaluation mode.

    Raises
    ------
    UserError for a missing configuration value, a missing, unexpected or misshapen weight.
    """
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"the configuration lacks {', '.join(missing)}; it needs {REQUIRED}")
    if not config.get("normalize_before", True):
        raise UserError("normalize_before=False is not supported; published models use True")
    # The published Conformer encoder takes Swish whatever `activation` says.
    decoder_activation = getattr(nn, config["activation"])
    conformer = config["encoder_module"] == "conformer"
    mixer = make_mixer(config)
    encoder = Encoder(
        config["input_size"],
        config["d_model"],
        config["d_ffn"],
        config["num_encoder_layers"],
        mixer,
        config["kernel_size"],
        nn.SiLU if conformer else decoder_activation,
        config["dropout"],
        config["causal"],
    )
    model = UpstreamModel(encoder, make_decoder(config, decoder_activation))
    load_strictly(model, convert(state_dict, bidirectional=mixer.func is BiMamba))
    return model.eval()
