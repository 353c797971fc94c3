"""Recognizer: a package folder to transcripts, as the training script's test stage makes them."""

import math
from functools import partial
from pathlib import Path

import torch
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from inference.align import align
from inference.audio import open_audio, read
from inference.files import NGRAM, load_parts, model_of, present, read_config
from inference.hub import located
from inference.listener import Listener
from inference.parts import build_parts
from inference.through import Through
from inference.windows import WHOLE, WINDOW
from modules.errors import UserError, out_of_memory
from modules.language_model import PUBLISHED, find_tokenizer, load_language_model
from modules.launch import best_device, check_device, limit_fft_plans
from modules.lengths import relative

# A search without language model reads few tokens of a frame. So many, and no bonus a word, were
# best with a 3-gram on a development set (docs/results.md).
WIDE, NO_BONUS = -8.0, {"beta": 0.0}


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
    def from_folder(
        cls, folder, device="auto", beam_size=None, lm=None, lm_weight=None, word_bonus=None
    ):
        """Load what package.py wrote; of a folder, nothing is written and no network is used.

        folder: or user/model[@revision] on the Hugging Face hub (`inference.hub`).
        device: auto (the best present), cpu, cuda, cuda:N or mps.
        beam_size: hypotheses kept, in place of the package's number.
        lm: a language model in place of the package's: a word n-gram, .arpa or .bin, for a CTC
        model; the folder of one from train_LM.py for a model with a decoder.
        An n-gram for the package of a run without one is searched as WIDE, with no bonus a word.
        lm_weight: of the language model; None: the package's, or 0.5.
        word_bonus: added for every word where a CTC model has an n-gram; None: the package's, or 0.
        UserError names the file or the weight that is missing, unexpected or damaged.
        """
        folder = located(folder)
        device = best_device() if device == "auto" else check_device(device)
        limit_fft_plans(device)
        config = read_config(folder / "config.json")
        change_search(config, folder, beam_size, lm, lm_weight, word_bonus)
        parts = build_parts(config["parts"])
        load_parts(parts, config, folder)
        if lm is not None and "decoder" in parts:
            use_language_model(parts, config, Path(lm))
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
            return self._words(signals)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Out of the handler: the error holds all that was computed.
        if "decoder" in self.model:
            self.search.release()
        longest = max(len(s) for s in signals) / self.sample_rate
        raise UserError(
            f"{len(signals)} pieces of up to {longest:.1f} s do not fit into the memory of "
            f"{self.device}; give a smaller batch_size, or smaller chunk_seconds"
        )

    def _words(self, signals):
        x, lengths = self._encode(signals)
        tokens, log_probs = self._search(x, lengths)
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


def change_search(config, folder, beam_size, lm, lm_weight, word_bonus):
    """Let a package have another beam or language model; UserError where it cannot."""
    parts = config["parts"]
    tuned = "lm_weight" in config  # with an n-gram, which need not be in the package
    if beam_size is not None:
        if beam_size < 1:
            raise UserError(f"beam_size={beam_size} must be at least 1, which is greedy search")
        parts["search"]["beam_size"] = beam_size
    if word_bonus is not None and "decoder" in parts:
        raise UserError(
            f"word_bonus={word_bonus}: this model has a decoder, and a bonus a word goes with the "
            "n-gram of a CTC model alone; leave it out"
        )
    for name, value in (("lm_weight", lm_weight), ("word_bonus", word_bonus)):
        if value is None:
            continue
        if not math.isfinite(value):
            raise UserError(f"{name}={value} must be a number, such as 0.5")
        if lm is None and "ngram" not in config and "language_model" not in parts:
            raise UserError(
                f"{name}={value} is a language model's, and the package has none; give lm"
            )
    if lm_weight is not None:
        config["lm_weight"] = lm_weight
    if "decoder" in parts:
        if lm is not None and not Path(lm).exists() and not Path(lm).suffix:  # no file's name
            raise UserError(f"lm={lm}: there is no such folder")
        if lm is not None and not Path(lm).is_dir():
            raise UserError(
                f"lm={lm}: this model has a decoder, and a word n-gram goes with CTC models alone; "
                "give the folder of a language model that train_LM.py made, or leave it out"
            )
        return
    if lm is not None and Path(lm).is_dir():
        raise UserError(
            f"lm={lm}: this is a CTC model, whose search takes a word n-gram; give an .arpa or "
            ".bin file (python -m modules.lm.ngram makes one)"
        )
    if lm is None and "ngram" in config:
        lm = present(folder / NGRAM)
    if lm is not None:
        if not tuned:
            search = parts["search"] = NO_BONUS | parts["search"]
            search["token_prune_min_logp"] = min(search.get("token_prune_min_logp", 0), WIDE)
        weight = config.get("lm_weight", 0.5)
        parts["search"] |= {"kenlm_model_path": str(lm), "alpha": weight}
        if word_bonus is not None:
            parts["search"]["beta"] = word_bonus


def use_language_model(parts, config, folder):
    """Let the search of a model with a decoder use the language model in a folder."""
    if not (folder / "lm.ckpt").is_file():
        raise UserError(f"lm={folder} holds no lm.ckpt; give the output folder of train_LM.py")
    tokenizer = find_tokenizer(folder)
    ours = parts["tokenizer"].model
    if tokenizer.read_bytes() != ours.serialized_model_proto():
        raise UserError(
            f"lm={folder}: its {tokenizer.name} is not the model's tokenizer.ckpt; train it over "
            "the model's units, with --tokenizer_path of that file"
        )
    make_lm = partial(TransformerLM, vocab=len(parts["tokenizer"]), **PUBLISHED)
    lm = load_language_model(make_lm, folder)
    weight, temperature = config.get("lm_weight", 0.5), config.get("lm_temperature", 1.15)
    parts["search"].use_language_model(lm, weight, temperature)
