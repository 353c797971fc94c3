"""OnnxRecognizer: an exported file to transcripts, by numpy and onnxruntime alone."""

import numpy as np

from inference.listener import Listener
from inference.onnx.audio import open_audio, read
from inference.onnx.features import Features
from inference.onnx.search import ctc_beam, token_spans
from inference.onnx.session import description, open_session
from inference.words import spread, timed_words
from modules.errors import UserError

SHORTEST = 8  # feature frames of a graph's input
STEP = 320  # feature frames at a time, of a file exported with --streaming


class OnnxRecognizer(Listener):
    """A file of `export.py --to onnx`. Made by `OnnxRecognizer.from_file`.

    As `Recognizer`, of a CTC model; of an S2S model it hears what the CTC head does.
    """

    def __init__(self, session, about, beam_size=None):
        self.session, self.about = session, about
        self.sample_rate, self.vocabulary = about["sample_rate"], about["vocabulary"]
        self.whole_seconds, self.window_seconds = about["whole_seconds"], about["window_seconds"]
        self.features = Features(about["features"], self.sample_rate)
        self.search = about["search"] | ({} if beam_size is None else {"beam_size": beam_size})

    @classmethod
    def from_file(cls, path, beam_size=None, threads=None):
        """Load what export.py wrote.

        beam_size: hypotheses kept, in place of the file's number; threads: of onnxruntime.
        UserError for a file that is missing, damaged or another program's.
        """
        if beam_size is not None and beam_size < 1:
            raise UserError(f"beam_size={beam_size} must be at least 1")
        session = open_session(path, threads)
        return cls(session, description(session, path), beam_size)

    def open(self, audio, sample_rate=None):
        return open_audio(audio, sample_rate)

    def read(self, recording):
        return read(recording, self.sample_rate)

    def words(self, signals):
        """Signals, each (N,) float32 at the model's rate -> their lists of `Word`."""
        found = []
        for x, log_probs in zip(signals, self.log_probs(signals), strict=True):
            tokens = ctc_beam(log_probs, **self.search)
            spans = token_spans(tokens, log_probs)
            if spans is None:
                spans = spread(tokens, len(log_probs))
            pieces = [self.vocabulary[i] for i in tokens]
            duration = len(x) / self.sample_rate
            found.append(timed_words(pieces, spans, self.about["seconds_per_frame"], duration))
        return found

    def log_probs(self, signals):
        """Signals, each (N,) -> log-probabilities (T, V) of each."""
        features = [self.features(x) for x in signals]
        lengths = np.array([len(x) for x in features])
        multiple, again = self.about["frames_multiple_of"], self.about.get("frames_again", 0)
        frames = -(-max(*lengths, SHORTEST) // multiple) * multiple + again
        batch = np.zeros((len(features), frames, features[0].shape[1]), dtype=np.float32)
        for row, x in zip(batch, features, strict=True):
            row[: len(x)] = x
        if self.about["streaming"]:
            return self._in_steps(batch, lengths)
        y, counts = self.session.run(None, {"features": batch, "lengths": lengths})
        return [row[:n] for row, n in zip(y, counts, strict=True)]

    def _in_steps(self, batch, lengths):
        states = {
            s["name"]: np.zeros((len(batch), *s["shape"]), dtype=s["dtype"])
            for s in self.about["states"]
        }
        multiple, again = self.about["frames_multiple_of"], self.about.get("frames_again", 0)
        step = -(-STEP // multiple) * multiple
        parts = []
        for start in range(0, batch.shape[1] - again, step):
            piece = batch[:, start : start + step + again]
            left = np.clip(lengths - start, 0, piece.shape[1])
            feed = {"features": piece, "lengths": left, **states}
            y, counts, *new = self.session.run(None, feed)
            states = dict(zip(states, new, strict=True))
            parts.append([row[:n] for row, n in zip(y, counts, strict=True)])
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
