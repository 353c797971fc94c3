"""Recordings to transcripts, in batches and windows, whatever hears them."""

from itertools import islice

from inference.transcript import Result, transcript_of
from inference.windows import joined, limits, together, windows
from modules.errors import UserError

POOL = 8  # batches of files that are sorted by length together


class Listener:
    """What all recognisers share.

    One has `sample_rate`, `whole_seconds` and `window_seconds` (`inference.windows`), and
    open(audio, sample_rate) -> a recording with `name` and `seconds`; read(recording) -> its
    samples at the model's rate, blocks (N,); words(signals) -> a list of `Word` for each.
    """

    def transcribe(self, audio, sample_rate=None, batch_size=16, chunk_seconds=None):
        """Transcribe a path, a 1-D array or tensor of `sample_rate` Hz, or a list of these.

        Files bring their own rate. Any rate and number of channels will do. Of a list, batches of
        up to `batch_size` recordings of similar length are computed together; each gets the text
        that it gets alone. What is longer than `chunk_seconds` is heard in windows of at most that
        length, cut at silences, `batch_size` at a time; 0: all in one piece, long recordings in
        one streamed pass where the model can (`inference.through`). None: in one piece up to the
        longest utterance that training and test stage met, longer recordings in windows as long as
        the utterances of the training.
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
                recordings[i] = self.open(a, sample_rate)
            except UserError as error:
                yield i, error
        # Of unknown length: bounded memory, whatever comes.
        length = {i: r.seconds or float("inf") for i, r in recordings.items()}
        # The longest first: what does not fit into memory fails at once.
        order = sorted(recordings, key=lambda i: -length[i])
        short = []
        for i in order:
            through = None
            if window is None and length[i] > self.whole_seconds:
                through = self.through()
            try:
                if through is not None:
                    yield i, self._hear_through(recordings[i], through, progress)
                elif window is not None and length[i] > limit:
                    yield i, self._hear_long(recordings[i], batch_size, window, progress)
                else:
                    short.append(i)
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
                signals[i] = together(list(self.read(recording)))
            except UserError as error:
                yield i, error
        try:
            heard = self.words(list(signals.values())) if signals else []
        except UserError as error:
            yield from ((i, error) for i in signals)
            return
        for (i, x), words in zip(signals.items(), heard, strict=True):
            yield i, transcript_of(words, len(x) / self.sample_rate)

    def through(self):
        """What hears a long recording in one streamed pass, or None."""
        return None

    def _hear_through(self, recording, through, progress):
        """A recording in one streamed pass -> Transcript."""
        for block in self.read(recording):
            through.push(block)
            if progress is not None:
                progress(recording.name, through.seconds, recording.seconds)
        return transcript_of(through.finish(), through.seconds)

    def _hear_long(self, recording, batch_size, window, progress):
        """A recording in windows -> Transcript; a batch of windows is in memory, no more."""
        rate, words, end = self.sample_rate, [], 0.0
        source = windows(self.read(recording), int(window * rate), rate)
        while batch := list(islice(source, batch_size)):
            heard = self.words([w.x for w in batch])
            for piece, new in zip(batch, heard, strict=True):
                words = joined(words, piece, new, rate)
                end = (piece.start + len(piece.x)) / rate
            if progress is not None:
                progress(recording.name, end, recording.seconds)
        return transcript_of(words, end)


def check_batch_size(batch_size):
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    return batch_size
