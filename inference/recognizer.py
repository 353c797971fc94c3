"""Recognizer: a package folder to transcripts, as the training script's test stage makes them."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from inference.audio import load_audio
from inference.files import load_parts, model_of, read_config
from inference.parts import build_parts
from inference.transcript import Transcript
from modules.errors import UserError
from modules.launch import best_device, check_device
from modules.lengths import relative


class Recognizer:
    """A packaged model.

    Made by `Recognizer.from_folder`. Only the classes listed in `inference.parts` are made, and
    weights are read as tensors alone, so that a package runs no code of its own.
    """

    def __init__(self, parts, sample_rate, device):
        self.sample_rate, self.device = sample_rate, torch.device(device)
        self.features = parts["features"].eval().to(self.device)
        self.normalize = parts["normalize"].eval().to(self.device)
        self.model = model_of(parts).eval().requires_grad_(False).to(self.device)
        self.tokenizer, self.search = parts["tokenizer"], parts["search"]
        if isinstance(self.search, nn.Module):  # brings the language model along
            self.search.eval().to(self.device)

    @classmethod
    def from_folder(cls, folder, device="auto"):
        """Load what package.py wrote; nothing is written and no network is used.

        device: auto (the best present), cpu, cuda, cuda:N or mps.
        UserError names the file or the weight that is missing, unexpected or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; package.py makes one from a training")
        device = best_device() if device == "auto" else check_device(device)
        config = read_config(folder / "config.json")
        parts = build_parts(config["parts"])
        load_parts(parts, config, folder)
        return cls(parts, config["sample_rate"], device)

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
