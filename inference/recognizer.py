"""Recognizer: a package folder to transcripts, as the training script's test stage makes them."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from inference.align import align
from inference.audio import open_audio, read
from inference.files import load_parts, model_of, read_config
from inference.hub import located
from inference.listener import Listener
from inference.parts import build_parts
from inference.through import Through
from inference.windows import WHOLE, WINDOW
from modules.errors import UserError
from modules.launch import best_device, check_device
from modules.lengths import relative


class Recognizer(Listener):
    """A packaged model.

    Made by `Recognizer.from_folder`. Only the classes listed in `inference.parts` are made, and
    weights are read as tensors alone, so that a package runs no code of its own.
    """

    def __init__(self, parts, sample_rate, device, whole_seconds=WHOLE, window_seconds=WINDOW):
        self.sample_rate, self.device = sample_rate, torch.device(device)
        self.whole_seconds, self.window_seconds = whole_seconds, window_seconds
        self.features = parts["features"].eval().to(self.device)
        self.normalize = parts["normalize"].eval().to(self.device)
        self.model = model_of(parts).eval().requires_grad_(False).to(self.device)
        self.tokenizer, self.search = parts["tokenizer"], parts["search"]
        if isinstance(self.search, nn.Module):  # brings the language model along
            self.search.eval().to(self.device)

    @classmethod
    def from_folder(cls, folder, device="auto", beam_size=None, lm=None, lm_weight=0.5):
        """Load what package.py wrote; of a folder, nothing is written and no network is used.

        folder: or user/model[@revision] on the Hugging Face hub (`inference.hub`).
        device: auto (the best present), cpu, cuda, cuda:N or mps.
        beam_size: hypotheses kept, in place of the package's number.
        lm, lm_weight: a word n-gram, .arpa or .bin, for the search of a CTC model.
        UserError names the file or the weight that is missing, unexpected or damaged.
        """
        folder = located(folder)
        device = best_device() if device == "auto" else check_device(device)
        config = read_config(folder / "config.json")
        change_search(config["parts"], beam_size, lm, lm_weight)
        try:
            parts = build_parts(config["parts"])
        except OSError as error:  # no part but an n-gram reads a file
            raise UserError(f"lm={lm} is no n-gram that KenLM reads: {error}") from None
        load_parts(parts, config, folder)
        known = {k: config[k] for k in ("whole_seconds", "window_seconds") if k in config}
        return cls(parts, config["sample_rate"], device, **known)

    def open(self, audio, sample_rate=None):
        return open_audio(audio, sample_rate)

    def read(self, recording):
        return read(recording, self.sample_rate)

    @torch.no_grad()
    def texts(self, signals):
        """Signals, each (N,) float32 at the model's rate -> their texts, words one space apart."""
        tokens, _ = self._search(*self._encode(signals))
        return [" ".join(self.tokenizer.decode(ids).split()) for ids in tokens]

    @torch.no_grad()
    def words(self, signals):
        """Signals, each (N,) float32 at the model's rate -> their lists of `Word`."""
        try:
            x, lengths = self._encode(signals)
            tokens, log_probs = self._search(x, lengths)
        except torch.OutOfMemoryError:
            longest = max(len(s) for s in signals) / self.sample_rate
            raise UserError(
                f"{len(signals)} pieces of up to {longest:.1f} s do not fit into the memory of "
                f"{self.device}; give a smaller batch_size, or smaller chunk_seconds"
            ) from None
        hop = self.seconds_per_frame
        return [
            align(ids, y[:length], hop, len(s) / self.sample_rate, self.tokenizer)
            for ids, y, length, s in zip(tokens, log_probs, lengths.tolist(), signals, strict=True)
        ]

    def through(self):
        """What hears a long recording in one streamed pass; None where the model cannot."""
        encoder = self.model["encoder"]
        if "decoder" in self.model or not (encoder.causal or encoder.chunk_size):
            return None
        try:
            return Through(self)
        except UserError:  # of features or normalisation that need the whole
            return None

    def ctc_tokens(self, log_probs, lengths):
        """Log-probabilities (B, T, V) of CTC, lengths (B,) -> B lists of tokens.

        Spaces at their ends are kept, as alignment wants them; an n-gram's texts have none.
        """
        if self.search.searcher is None:
            return self.search.tokens(log_probs, lengths)
        return [self.tokenizer.encode(text) for text in self.search(log_probs, lengths)]

    @property
    def seconds_per_frame(self):
        """From one frame of the encoder to the next."""
        return self.features.hop * self.model["frontend"].subsampling / self.sample_rate

    def encode(self, wavs, lengths):
        """wavs (B, N), lengths (B,) in samples -> encoder output (B, T, D), lengths in frames."""
        x, lengths = self.features(wavs, lengths)
        x = self.normalize(x, relative(lengths, x.shape[1]))
        x, lengths = self.model["frontend"](x, lengths)
        return self.model["encoder"](x, lengths)

    def _encode(self, signals):
        lengths = torch.tensor([len(x) for x in signals], device=self.device)
        return self.encode(pad_sequence(signals, batch_first=True).to(self.device), lengths)

    def _search(self, x, lengths):
        """Encoder output (B, T, D), lengths (B,) -> B lists of tokens, log-probabilities of CTC."""
        log_probs = self.model["ctc_head"](x).log_softmax(dim=-1)
        if "decoder" not in self.model:
            return self.ctc_tokens(log_probs, lengths), log_probs
        return self.search(x, lengths)[0], log_probs


def change_search(parts, beam_size, lm, lm_weight):
    """Let a package's configuration have another beam or an n-gram; UserError where it cannot."""
    if beam_size is not None:
        if beam_size < 1:
            raise UserError(f"beam_size={beam_size} must be at least 1, which is greedy search")
        parts["search"]["beam_size"] = beam_size
    if lm is None:
        return
    if "decoder" in parts:
        raise UserError(
            f"lm={lm}: this model has a decoder, and a word n-gram goes with CTC models alone; "
            "leave it out"
        )
    parts["search"] |= {"kenlm_model_path": str(lm), "alpha": lm_weight}
