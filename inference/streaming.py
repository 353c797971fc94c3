"""StreamingRecognizer: a model hears a stream as it comes, with state of constant size."""

import torch

from inference.audio import from_array
from inference.recognizer import Recognizer
from inference.segmenter import Segmenter
from inference.streaming_ctc import StreamingCTC
from inference.transcript import Partial, transcript_of
from modules.errors import UserError

CHUNK = 0.32  # s that a causal model computes at once
LONGEST = 60  # s of a chunk: its features are in memory together


class StreamingRecognizer:
    """A packaged causal or chunked model that hears a stream.

    Made by `StreamingRecognizer.from_folder`. Audio is computed in chunks of `chunk_seconds`, so
    that the result does not depend on the packets it comes in.
    """

    def __init__(self, recognizer, chunk_seconds=None, endpoint_seconds=0.8, history=True):
        hop = recognizer.seconds_per_frame
        if chunk_seconds is None:
            chunk_seconds = hop * (recognizer.model["encoder"].chunk_size or round(CHUNK / hop))
        if not hop <= chunk_seconds <= LONGEST:
            raise UserError(
                f"chunk_seconds={chunk_seconds} is shorter than a frame of this model, {hop:g} s, "
                f"or longer than {LONGEST} s; give {CHUNK}, for instance"
            )
        frames = round(chunk_seconds / hop)
        self.ctc = StreamingCTC(recognizer, frames)
        self.sample_rate = recognizer.sample_rate
        self.segmenter = Segmenter(recognizer.tokenizer, hop, endpoint_seconds, history)
        self.chunk = frames * self.ctc.hop
        # The first chunk waits for what it looks at; from then on there is one for each `chunk`.
        self.buffer = torch.zeros(self.chunk + max(0, self.ctc.lookahead - self.ctc.hop))
        for _ in range(2):  # the first calls of all are slow
            self.ctc.advance(self.buffer)
        self.reset()

    @classmethod
    def from_folder(
        cls, folder, device="auto", chunk_seconds=None, endpoint_seconds=0.8, history=True
    ):
        """Load what package.py wrote; nothing is written and no network is used.

        device: auto (the best present), cpu, cuda, cuda:N or mps.
        chunk_seconds: what is computed at once, rounded to whole frames of the encoder. None: a
        chunked model's own chunk, with which it was tested; 0.32 for a causal one.
        endpoint_seconds: a pause that ends a segment; None: none does.
        history: remember final segments for `finish`, some bytes a word. False for streams
        without end: `finish` then gives what has not been final.
        UserError for a package that is damaged or whose model needs whole recordings.
        """
        recognizer = Recognizer.from_folder(folder, device)
        return cls(recognizer, chunk_seconds, endpoint_seconds, history)

    @property
    def chunk_seconds(self):
        return self.chunk / self.sample_rate

    @property
    def lookahead_seconds(self):
        """Audio that must follow the time of a chunk's last frame before it can be computed."""
        return self.ctc.lookahead / self.sample_rate

    @property
    def delay_seconds(self):
        """Audio that follows the time of a chunk's first frame when it is computed."""
        return (self.chunk - self.ctc.hop + self.ctc.lookahead) / self.sample_rate

    def reset(self):
        """Forget all that was pushed: a new utterance begins."""
        self.ctc.reset()
        self.segmenter.reset()
        self.filled = self.heard = self.chunks = 0
        self.room = len(self.buffer)
        self.partial = Partial("")

    def push(self, samples, sample_rate=None):
        """Hear the next samples, a 1-D array or tensor of any length -> Partial.

        sample_rate: checked against the model's, if given.
        UserError, and nothing is heard, for another rate, another shape or NaN.
        """
        x = self._checked(samples, sample_rate)
        finals = []
        while len(x):
            room = self.buffer[self.filled : self.room]
            piece, x = x[: len(room)], x[len(room) :]
            room[: len(piece)] = piece
            self.filled += len(piece)
            if self.filled == self.room:
                finals += self._hear()
        partial = self.partial
        return Partial(partial.text, partial.words, tuple(finals)) if finals else partial

    def finish(self):
        """The stream ends here -> Transcript of it; then a new utterance begins.

        Without history, the transcript of what has not been final.
        """
        if self.heard or self.filled:
            self._hear(final=True)
        duration = self.heard / self.sample_rate
        transcript = transcript_of(self.segmenter.words(duration), duration)
        self.reset()
        return transcript

    def _checked(self, samples, sample_rate):
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise UserError(
                f"sample_rate={sample_rate} is not this model's {self.sample_rate}; resample "
                "before (stream.py does)"
            )
        x = from_array(samples, self.sample_rate)
        if not torch.isfinite(x).all():
            raise UserError("the samples are not finite; give finite ones")
        return x

    def _hear(self, final=False):
        """Compute what the buffer holds -> the segments that end in it."""
        log_probs = self.ctc.advance(self.buffer[: self.filled], final)
        self.heard += self.filled
        self.chunks += 1
        self.filled, self.room = 0, self.chunk
        finals = self.segmenter.hear(log_probs)
        words = self.segmenter.partial()
        self.partial = Partial(" ".join(w.text for w in words), tuple(words))
        return finals
