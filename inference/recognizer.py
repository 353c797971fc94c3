"""Recognizer: a package folder to transcripts, as the training script's test stage makes them."""

import json
import os
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from inference.audio import load_audio
from inference.parts import FORMAT, MODEL, build_parts
from inference.transcript import Transcript
from modules.errors import UserError
from modules.language_model import load_language_model
from modules.launch import best_device, check_device
from modules.lengths import relative
from modules.tokenizer import SubwordTokenizer


class Recognizer:
    """A packaged model.

    Made by `Recognizer.from_folder`. Only the classes listed in `inference.parts` are made, and
    weights are read as tensors alone, so that a package runs no code of its own.
    """

    def __init__(self, config, folder, device):
        self.sample_rate = config["sample_rate"]
        self.device = torch.device(device)
        parts = build_parts(config["parts"])
        self.features = parts["features"].eval().to(self.device)
        self.normalize = parts["normalize"].eval()
        load_statistics(self.normalize, folder / "normalizer.ckpt")
        self.normalize.to(self.device)
        self.model = nn.ModuleDict({name: parts[name] for name in MODEL if name in parts})
        load_weights(self.model, folder / "model.ckpt")
        self.model.eval().requires_grad_(False).to(self.device)
        self.tokenizer, self.search = parts["tokenizer"], parts["search"]
        if isinstance(self.tokenizer, SubwordTokenizer):
            self.tokenizer.load(present(folder / "tokenizer.ckpt"))
        if "language_model" in parts:
            present(folder / "lm.ckpt")
            lm = load_language_model(parts["language_model"], folder)
            self.search.use_language_model(
                lm.to(self.device), config["lm_weight"], config["lm_temperature"]
            )

    @classmethod
    def from_folder(cls, folder, device="auto"):
        """Load what package.py wrote; nothing is written and no network is used.

        device: auto (the best present), cpu, cuda, cuda:N or mps.
        UserError names the file or the weight that is missing, unexpected or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; package.py makes one from a training")
        config = read_config(folder / "config.json")
        return cls(config, folder, best_device() if device == "auto" else check_device(device))

    def transcribe(self, audio, sample_rate=None, batch_size=16):
        """Transcribe a path, a 1-D array or tensor of `sample_rate` Hz, or a list of these.

        Files bring their own rate. Any rate and number of channels will do. Of a list, batches of
        up to `batch_size` recordings of similar length are computed together; each gets the text
        that it gets alone. Returns a Transcript, or a list of them in the order of `audio`.
        """
        if not isinstance(audio, list | tuple):
            return self.transcribe([audio], sample_rate)[0]
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        signals = [load_audio(a, sample_rate, self.sample_rate) for a in audio]
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(signals)), key=lambda i: -len(signals[i]))
        texts = [""] * len(signals)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, text in zip(chosen, self.texts([signals[i] for i in chosen]), strict=True):
                texts[i] = text
        return [
            Transcript(text, len(x) / self.sample_rate)
            for text, x in zip(texts, signals, strict=True)
        ]

    @torch.no_grad()
    def texts(self, signals):
        """Signals, each (N,) float32 at the model's rate -> their texts, words one space apart."""
        lengths = torch.tensor([len(x) for x in signals], device=self.device)
        x, lengths = self.encode(pad_sequence(signals, batch_first=True).to(self.device), lengths)
        if "decoder" not in self.model:
            return self.search(self.model["ctc_head"](x).log_softmax(dim=-1), lengths)
        hypotheses, _ = self.search(x, lengths)
        return [" ".join(self.tokenizer.decode(ids).split()) for ids in hypotheses]

    def encode(self, wavs, lengths):
        """wavs (B, N), lengths (B,) in samples -> encoder output (B, T, D), lengths in frames."""
        x, lengths = self.features(wavs, lengths)
        x = self.normalize(x, relative(lengths, x.shape[1]))
        x, lengths = self.model["frontend"](x, lengths)
        return self.model["encoder"](x, lengths)


def present(path):
    """The path; UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the package is incomplete; package again")
    return path


def read_config(path):
    """config.json as plain data; UserError when it is none, or of another format."""
    try:
        config = json.loads(present(path).read_text(encoding="utf-8"))
        form = config["format"]
        if form == FORMAT:
            config["sample_rate"], config["parts"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, or no package's configuration") from None
    if form != FORMAT:
        raise UserError(
            f"{path} has format {form} and this code reads {FORMAT}; package again with this code"
        )
    return config


def load_tensors(path):
    """A dict of tensors and numbers; UserError when the file is damaged or holds anything else."""
    present(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        size = os.path.getsize(path)
        raise UserError(
            f"{path} ({size} bytes) is damaged: {reason}; copy the package again"
        ) from None


def load_weights(model, path):
    """Load strictly; UserError naming every missing, unexpected or misshapen weight."""
    weights, wanted = load_tensors(path), model.state_dict()
    problems = [f"missing weight {name!r}" for name in wanted if name not in weights]
    problems += [f"unexpected weight {name!r}" for name in weights if name not in wanted]
    problems += [
        f"weight {name!r} has shape {tuple(weights[name].shape)}, config.json wants "
        f"{tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} does not fit config.json:\n  {shown}{more}")
    model.load_state_dict(weights, strict=True)


def load_statistics(normalize, path):
    """Read the feature statistics of a package or a checkpoint."""
    stats = load_tensors(path)
    names = ("count", "glob_mean", "glob_std")
    if not isinstance(stats, dict) or set(stats) != set(names):
        raise UserError(f"{path} does not hold {', '.join(names)} and nothing else")
    if normalize.norm_type == "global" and not stats["glob_mean"].numel():
        raise UserError(f"{path} holds no statistics yet; train for at least one step")
    for name in names:
        setattr(normalize, name, stats[name])
