"""A package as SpeechBrain's EncoderASR or EncoderDecoderASR: its hyperparams.yaml names these.

EncoderASR.from_hparams(source=DIR) for CTC, EncoderDecoderASR.from_hparams(source=DIR) for S2S.
"""

import json
from pathlib import Path

from speechbrain.utils.checkpoints import mark_as_transfer, register_checkpoint_hooks
from torch import nn

from inference.files import add_language_model, load_statistics, load_weights, model_of
from inference.recognizer import Recognizer
from inference.windows import WHOLE, WINDOW
from modules.lengths import absolute, zero_padding
from modules.search.ctc import forbid
from modules.search.ctc_beam import ctc_beam

CLASSES = "inference.speechbrain_parts"


def hyperparams(config):
    """The text of a package's hyperparams.yaml, for SpeechBrain; `config` is config.json's."""
    joint = "decoder" in config["parts"]
    files = {"model": "encoder", "normalizer": "statistics"}
    if joint:
        files["tokenizer"] = "tokenizer"
    lines = [
        "# For SpeechBrain; made from config.json, which Recognizer reads.",
        f"sample_rate: {config['sample_rate']}",
        f"whole_seconds: {config.get('whole_seconds', WHOLE)}",
        f"window_seconds: {config.get('window_seconds', WINDOW)}",
        "parts: !apply:inference.parts.build_parts",
        f"    config: {json.dumps(config['parts'], ensure_ascii=False)}",
        *new("encoder", "Encoder"),
        *new("statistics", "Statistics"),
        *new("tokenizer", "Tokenizer"),
    ]
    if joint:
        lines += new("decoder", "Decoder")
    else:
        lines += [f"decoding_function: !name:{CLASSES}.decode_ctc", "    parts: !ref <parts>"]
    if "language_model" in config["parts"]:
        files["lm"] = "language_model"
        lines += [
            *new("language_model", "LanguageModel"),
            f"    weight: {config['lm_weight']}",
            f"    temperature: {config['lm_temperature']}",
        ]
    lines += ["modules:", "    encoder: !ref <encoder>"]
    lines += ["    decoder: !ref <decoder>"] if joint else []
    lines += [
        "audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer",
        "    sample_rate: !ref <sample_rate>",
        "pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer",
        "    loadables:",
        *(f"        {file}: !ref <{key}>" for file, key in files.items()),
    ]
    return "\n".join(lines) + "\n"


def new(key, name):
    return [f"{key}: !new:{CLASSES}.{name}", "    parts: !ref <parts>"]


@register_checkpoint_hooks
class Encoder(nn.Module):
    """Waveforms to what SpeechBrain's interfaces decode.

    wavs (B, N), wav_lens (B,) relative -> CTC: log-probabilities (B, T, V), a certain blank past an
    utterance's end; S2S: memory (B, T, D), zero past it. Both tell the lengths in frames, which
    relative lengths of waveforms do not.
    """

    def __init__(self, parts):
        super().__init__()
        self.features, self.normalize = parts["features"], parts["normalize"]
        self.model = model_of(parts)

    encode = Recognizer.encode

    def forward(self, wavs, wav_lens):
        # Its statistics are no buffers: they do not follow the module they are in.
        self.normalize.to(wavs.device)
        x, lengths = self.encode(wavs, absolute(wav_lens, wavs.shape[1]))
        if "decoder" in self.model:
            return zero_padding(x, lengths)
        log_probs = self.model["ctc_head"](x).log_softmax(dim=-1)
        blank = log_probs.new_full(log_probs.shape[-1:], float("-inf"))
        blank[0] = 0.0
        for i, length in enumerate(lengths.tolist()):
            log_probs[i, length:] = blank
        return log_probs

    @mark_as_transfer
    def load(self, path, end_of_epoch=False):
        load_weights(self.model, Path(path))


@register_checkpoint_hooks
class Statistics:
    """The feature statistics."""

    def __init__(self, parts):
        self.normalize = parts["normalize"]

    @mark_as_transfer
    def load(self, path, end_of_epoch=False):
        load_statistics(self.normalize, Path(path))


@register_checkpoint_hooks
class Tokenizer:
    """Tokens to text as the test stage writes it: words one space apart."""

    def __init__(self, parts):
        self.tokenizer = parts["tokenizer"]

    def decode_ids(self, ids):
        return " ".join(self.tokenizer.decode(ids).split())

    @mark_as_transfer
    def load(self, path, end_of_epoch=False):
        self.tokenizer.load(path)


@register_checkpoint_hooks
class LanguageModel:
    """The search's language model."""

    def __init__(self, parts, weight, temperature):
        self.parts, self.weight, self.temperature = parts, weight, temperature

    @mark_as_transfer
    def load(self, path, end_of_epoch=False):
        add_language_model(self.parts, self.weight, self.temperature, Path(path).parent)


class Decoder(nn.Module):
    """The joint beam search: memory (B, T, D) of `Encoder` -> hypotheses and three of no use."""

    def __init__(self, parts):
        super().__init__()
        self.search = parts["search"]

    def forward(self, memory, wav_lens):
        # A frame of the encoder's output is never all zeros; those past the end are.
        hypotheses, scores = self.search(memory, memory.ne(0).any(dim=-1).sum(dim=1))
        return hypotheses, None, scores, None


def decode_ctc(log_probs, wav_lens, parts):
    """The beam search of a package: log-probabilities of `Encoder` -> B lists of tokens."""
    search = parts["search"]
    lengths = wav_lens.new_full(wav_lens.shape, log_probs.shape[1]).long()
    log_probs = forbid(log_probs.float(), search.forbidden)
    return ctc_beam(log_probs, lengths, blank_index=search.blank_index, **search.pruning)
