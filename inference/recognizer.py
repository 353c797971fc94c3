"""Recognizer: a package folder to transcripts, as the training script's test stage makes them."""

from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from inference.align import align
from inference.audio import open_audio, read
from inference.files import load_parts, model_of, read_config
from inference.parts import build_parts
from inference.transcript import Result, transcript_of
from inference.windows import WHOLE, WINDOW, joined, limits, windows
from modules.errors import UserError
from modules.launch import best_device, check_device
from modules.lengths import relative

POOL = 8  # batches of files that are sorted by length together


class Recognizer:
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
        """Load what package.py wrote; nothing is written and no network is used.

        device: auto (the best present), cpu, cuda, cuda:N or mps.
        beam_size: hypotheses kept, in place of the package's number.
        lm, lm_weight: a word n-gram, .arpa or .bin, for the search of a CTC model.
        UserError names the file or the weight that is missing, unexpected or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; package.py makes one from a training")
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

    def transcribe(self, audio, sample_rate=None, batch_size=16, chunk_seconds=None):
        """Transcribe a path, a 1-D array or tensor of `sample_rate` Hz, or a list of these.

        Files bring their own rate. Any rate and number of channels will do. Of a list, batches of
        up to `batch_size` recordings of similar length are computed together; each gets the text
        that it gets alone. What is longer than `chunk_seconds` is heard in windows of at most that
        length, cut at silences, `batch_size` at a time; 0: all in one piece. None: in one piece
        up to the longest utterance that training and test stage met, longer recordings in windows
        as long as the utterances of the training.
        Returns a Transcript, or a list of them in the order of `audio`.
        """
        if not isinstance(audio, list | tuple):
            return self.transcribe([audio], sample_rate, batch_size, chunk_seconds)[0]
        found = {}
        for i, outcome in self._outcomes(audio, sample_rate, batch_size, chunk_seconds):
            if isinstance(outcome, UserError):
                raise outcome
            found[i] = outcome
        return [found[i] for i in range(len(audio))]

    def transcribe_files(
        self, paths, batch_size=16, chunk_seconds=None, in_order=True, progress=None
    ):
        """Transcribe any number of files: yields a Result for each.

        A file that cannot be used gives a Result with the reason, and the others go on. Files are
        opened a pool of batches at a time, so `paths` may be endless.
        in_order: in the order of `paths`; otherwise each as soon as it is heard.
        progress: called with (path, seconds heard, seconds or None) while a long file is heard.
        """
        paths = iter(paths)
        while pool := list(islice(paths, POOL * check_batch_size(batch_size))):
            found, given = {}, 0
            for i, outcome in self._outcomes(pool, None, batch_size, chunk_seconds, progress):
                if isinstance(outcome, UserError):
                    result = Result(str(pool[i]), error=str(outcome))
                else:
                    result = Result(str(pool[i]), outcome)
                if not in_order:
                    yield result
                    continue
                found[i] = result
                while given in found:
                    yield found.pop(given)
                    given += 1

    def _outcomes(self, audio, sample_rate, batch_size, chunk_seconds, progress=None):
        """Yield (index, Transcript or UserError), the longest first."""
        check_batch_size(batch_size)
        limit, window = limits(chunk_seconds, self.whole_seconds, self.window_seconds)
        recordings = {}
        for i, a in enumerate(audio):
            try:
                recordings[i] = open_audio(a, sample_rate)
            except UserError as error:
                yield i, error
        # Of unknown length: bounded memory, whatever comes.
        length = {i: r.seconds or float("inf") for i, r in recordings.items()}
        # The longest first: what does not fit into memory fails at once.
        order = sorted(recordings, key=lambda i: -length[i])
        short = [i for i in order if window is None or length[i] <= limit]
        for i in order[: len(order) - len(short)]:
            try:
                yield i, self._hear_long(recordings[i], batch_size, window, progress)
            except UserError as error:
                yield i, error
        for start in range(0, len(short), batch_size):
            chosen = {i: recordings[i] for i in short[start : start + batch_size]}
            yield from self._hear_batch(chosen)

    def _hear_batch(self, recordings):
        """{index: short recording} -> (index, Transcript or UserError) of each."""
        signals = {}
        for i, recording in recordings.items():
            try:
                signals[i] = torch.cat(list(read(recording, self.sample_rate)))
            except UserError as error:
                yield i, error
        try:
            heard = self.words(list(signals.values())) if signals else []
        except UserError as error:
            yield from ((i, error) for i in signals)
            return
        for (i, x), words in zip(signals.items(), heard, strict=True):
            yield i, transcript_of(words, len(x) / self.sample_rate)

    def _hear_long(self, recording, batch_size, window, progress):
        """A recording in windows -> Transcript; a batch of windows is in memory, no more."""
        rate, words, end = self.sample_rate, [], 0.0
        source = windows(read(recording, rate), int(window * rate), rate)
        while batch := list(islice(source, batch_size)):
            heard = self.words([w.x for w in batch])
            for piece, new in zip(batch, heard, strict=True):
                words = joined(words, piece, new, rate)
                end = (piece.start + len(piece.x)) / rate
            if progress is not None:
                progress(recording.name, end, recording.seconds)
        return transcript_of(words, end)

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
            return [self.tokenizer.encode(t) for t in self.search(log_probs, lengths)], log_probs
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


def check_batch_size(batch_size):
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    return batch_size
