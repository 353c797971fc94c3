"""What training.py and inference.py measure: the shipped S2S recipes, and their baselines.

Every model is the recipe's own Brain, built from a shipped YAML file as train_S2S.py builds it.
ConMamba also comes with Mamba-2, and with 8x subsampling.
The baselines differ from the Conformer's file in one part: the mixer of the encoder, or the whole
Transformer, which is then SpeechBrain's `TransformerASR` between the same frontend and heads.
"""

import re
from pathlib import Path

import speechbrain as sb
import torch
from torch import nn

from modules import launch
from modules.lengths import relative
from modules.waveforms import Batch
from train_S2S import ASR

ROOT = Path(__file__).resolve().parent.parent

# FastConformer's subsampling by 8, of as many channels for the encoder.
EIGHT = {
    "large": "{channels: [64, 64, 64], separable: True}",
    "small": "{channels: [64, 64, 64], separable: True}",
    "tiny": "{channels: [16, 32, 32], separable: True}",
}
MAMBA2 = "    mixer: !name:modules.mamba2.BiMamba2\n"
ATTENTION = """\
    mixer: !name:modules.attention.{}
        num_heads: !ref <nhead>
        dropout: !ref <dropout>
"""
MODELS = {
    "conmamba": {"yaml": "conmamba"},
    "conmamba2": {"yaml": "conmamba", "mixer": MAMBA2},
    "conmamba-8x": {"yaml": "conmamba", "frontend": EIGHT},
    "conmambamamba": {"yaml": "conmambamamba"},
    "conformer-relpos": {"yaml": "conformer", "mixer": ATTENTION.format("RelPosAttention")},
    "conformer-rope": {"yaml": "conformer", "mixer": ATTENTION.format("RoPEAttention")},
    "speechbrain-relpos": {"yaml": "conformer", "speechbrain": "RelPosMHAXL"},
    "speechbrain-rope": {"yaml": "conformer", "speechbrain": "RoPEMHA"},
}
SIZES = ("large", "small", "tiny")
COMPILE_MODES = ("default", "reduce-overhead")


class PassOn(nn.Module):
    """Stands where the recipe has its encoder: the frontend's output goes on as it is."""

    def forward(self, x, lengths):
        return x, lengths


class SpeechBrainASR(ASR):
    """The recipe around SpeechBrain's `TransformerASR`."""

    parts = (*(name for name in ASR.parts if name != "decoder"), "transformer")

    def compute_forward(self, batch, stage):
        x, lengths = self.encode(*self.features(batch, stage))
        tokens, _ = self.tokens(batch, "tokens_bos", stage)
        memory, y = self.modules.transformer(x, tokens, relative(lengths, x.shape[1]))
        log_probs = self.modules.seq_head(y).log_softmax(dim=-1)
        return self.modules.ctc_head(memory), log_probs, memory, lengths, []


def make_transformer(hparams, attention_type):
    """SpeechBrain's Conformer and Transformer decoder, of the size of a recipe's hparams."""
    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

    return TransformerASR(
        tgt_vocab=hparams["output_neurons"],
        input_size=hparams["cnn_channels_2"] * ((hparams["n_mels"] + 3) // 4),
        d_model=hparams["d_model"],
        nhead=hparams["nhead"],
        num_encoder_layers=hparams["num_encoder_layers"],
        num_decoder_layers=hparams["num_decoder_layers"],
        d_ffn=hparams["d_ffn"],
        dropout=hparams["dropout"],
        activation=nn.GELU,
        kernel_size=hparams["kernel_size"],
        encoder_module="conformer",
        attention_type=attention_type,
        normalize_before=True,
        causal=False,
    )


def recipe_text(model, size):
    """The YAML file of a model; a baseline's with another mixer in its place."""
    spec = MODELS[model]
    path = ROOT / f"hparams/S2S/{spec['yaml']}_{size}.yaml"
    mixer = spec.get("mixer")
    if not path.is_file():  # there is no tiny Conformer: the ConMamba's file with attention
        path = ROOT / f"hparams/S2S/conmamba_{size}.yaml"
        mixer = mixer or ATTENTION.format("RelPosAttention")
    text = path.read_text(encoding="utf-8")
    if mixer is None or mixer in text:
        return text
    text, found = re.subn(r"^    mixer: !name:.*\n(?:        .*\n)*", mixer, text, flags=re.M)
    assert found == 1, f"{path} has {found} lines with a mixer"
    return text


def recipe_file(model, size, folder):
    """Write a model's YAML file into a folder."""
    path = Path(folder) / f"{model}_{size}.yaml"
    path.write_text(recipe_text(model, size), encoding="utf-8")
    return path


def build(model, size, folder, device, precision="bf16", compile_mode=None, overrides=()):
    """A Brain in training mode, ready for its first batch; augmentation is off.

    A step is an optimizer step. compile_mode: one of COMPILE_MODES, or None not to compile.
    overrides: more options of the command line, "key=value".
    """
    path = recipe_file(model, size, folder)
    options = {
        "output_folder": folder,
        "device": device,
        "precision": precision,
        "eval_precision": precision,
        "grad_accumulation_factor": 1,
        "fea_augment": "{augment_prob: 0.0}",
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    if "frontend" in MODELS[model]:
        arguments.append(f"--frontend={MODELS[model]['frontend'][size]}")
    arguments += [f"--{override}" for override in overrides]
    brain_class, attention_type = ASR, MODELS[model].get("speechbrain")
    if compile_mode and attention_type is None:
        arguments += ["--compile", f"--compile_mode={compile_mode}"]
    _, hparams, run_opts, _ = launch.start([str(path), *arguments])
    if attention_type is not None:
        brain_class = SpeechBrainASR
        names = ("normalize", "frontend", "ctc_head", "seq_head")
        hparams["modules"] = {name: hparams[name] for name in names}
        hparams["modules"] |= {
            "encoder": PassOn(),
            "transformer": make_transformer(hparams, attention_type),
        }
    brain = brain_class(hparams, run_opts)
    brain.on_fit_start()
    brain.modules.train()
    brain.zero_grad()
    settle(brain)
    return brain


def settle(brain):
    """Go to where most of a training happens: the features' statistics no longer change."""
    features = torch.randn(1, 100, brain.hparams.n_mels, device=brain.device)
    brain.modules.normalize(features, torch.ones(1, device=brain.device), 1)
    brain.hparams.epoch_counter.current = brain.hparams.normalize_until_epoch


def parameters(brain):
    """Millions."""
    return sum(p.numel() for p in brain.modules.parameters()) / 1e6


def training_step(brain, batch):
    """What `Brain.fit` does with a batch."""
    brain.step += 1
    return brain.fit_batch(batch)


def encode(brain, batch):
    """Waveforms to CTC logits (B, T, V), as a validation does."""
    with torch.no_grad(), brain.evaluation_ctx:
        x, lengths = brain.encode(*brain.features(batch, sb.Stage.VALID))
        if isinstance(brain, SpeechBrainASR):
            x = brain.modules.transformer.encode(x, relative(lengths, x.shape[1]))
        return brain.modules.ctc_head(x)


def make_batch(brain, number, seconds, tokens_a_second=60 / 16):
    """Noise of equal length with random tokens, on the brain's device."""
    hparams = brain.hparams
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, round(seconds * tokens_a_second)),)
    bos, eos = torch.tensor([hparams.bos_index]), torch.tensor([hparams.eos_index])
    examples = []
    for i in range(number):
        # 0, 1 and 2 are blank, bos and eos.
        ids = torch.randint(3, hparams.output_neurons, shape, generator=generator)
        examples.append(
            {
                "id": f"noise-{i}",
                "sig": 0.1 * torch.randn(round(seconds * hparams.sample_rate), generator=generator),
                "wrd": "",
                "tokens": ids,
                "tokens_bos": torch.cat([bos, ids]),
                "tokens_eos": torch.cat([ids, eos]),
            }
        )
    return Batch(examples).to(brain.device)


def batch_size(text):
    """'32x16' -> (32, 16.0): utterances, seconds each."""
    number, seconds = text.split("x")
    return int(number), float(seconds)
