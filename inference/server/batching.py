"""Recordings of many requests at once -> transcripts: whatever waits is computed together."""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from inference.audio import open_audio, read
from inference.server.limits import RefusedError
from inference.through import BLOCK
from inference.transcript import transcript_of
from inference.windows import joined, limits, settled, windows
from modules.errors import UserError

log = logging.getLogger("mamba_asr.server")
DECODERS = 4  # threads that decode and resample


@dataclass(frozen=True, eq=False)
class Piece:
    """Samples x (N,) that wait for the model, and the future of their words."""

    x: torch.Tensor
    words: asyncio.Future


class Batcher:
    """Cuts recordings into windows and hears the windows of all recordings in batches.

    The texts are those of `Recognizer.transcribe`. A recording alone keeps a batch full; of many
    each has few windows waiting, so that a short one does not wait for a long one's end.
    Coroutines of one event loop; the model computes in one thread of its own.
    """

    def __init__(self, recognizer, limits, metrics):
        self.recognizer, self.limits, self.metrics = recognizer, limits, metrics
        self.waiting, self.arrived, self.active = [], asyncio.Event(), 0
        self.model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")

    async def transcribe(self, path, heard=None):
        """A file -> Transcript.

        heard: called now and then with the words so far that stay as they are, and those after them
        that may still change.
        UserError when it cannot be heard, RefusedError when it is too long. Cancelling it takes its
        windows out of the queue.
        """
        recording = await self._decode(open_audio, path)
        whole, window = limits(None, self.recognizer.whole_seconds, self.recognizer.window_seconds)
        short = recording.seconds is not None and recording.seconds <= whole
        if heard is not None and short:  # for text before its end
            through = await self._compute_alone(self.recognizer.through)
            if through is not None:
                return await self._hear_through(recording, through, heard)
        ahead = deque()
        self.active += 1
        try:
            return await self._hear(recording, whole if short else window, ahead, heard)
        finally:
            self.active -= 1
            for _, words in ahead:
                words.cancel()

    async def _hear_through(self, recording, through, heard):
        """In one streamed pass, block by block between the batches of others."""

        def push(samples):
            through.push(samples)
            return through.maybe()

        blocks = self._read(recording)
        while (block := await self._decode(next, blocks, None)) is not None:
            for samples in block.split(int(BLOCK * self.recognizer.sample_rate)):
                heard(through.settled, await self._compute_alone(push, samples))
        words = await self._compute_alone(through.finish)
        return transcript_of(words, through.seconds)

    async def _hear(self, recording, seconds, ahead, heard):
        """In windows of so many seconds, which wait in the queue."""
        rate, words, end = self.recognizer.sample_rate, [], 0.0
        pieces = windows(self._read(recording), int(seconds * rate), rate)
        more = True
        while more or ahead:
            while more and len(ahead) < max(1, self.limits.batch // self.active):
                window = await self._decode(next, pieces, None)
                more = window is not None
                if more:
                    ahead.append((window, self._put(window.x)))
            if ahead:
                window, new = ahead.popleft()
                words = joined(words, window, await new, rate)
                end = (window.start + len(window.x)) / rate
                if heard is not None:
                    stay = settled(words, window, rate)
                    heard(words[:stay], words[stay:])
        return transcript_of(words, end)

    def _read(self, recording):
        """Yield the samples, no more than the limit: a header may say what it likes."""
        most, heard = self.limits.audio, 0
        if (recording.seconds or 0) > most:
            raise self._too_long(recording.seconds)
        for block in read(recording, self.recognizer.sample_rate):
            heard += len(block)
            if heard > most * self.recognizer.sample_rate:
                raise self._too_long()
            yield block

    def _too_long(self, seconds=None):
        found = f"{seconds:.0f} s" if seconds else "more than that"
        return RefusedError(
            413,
            f"the recording lasts {found} and this server takes {self.limits.audio:.0f} s; cut it",
        )

    async def _decode(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)

    def _put(self, x):
        """The future of a window's words."""
        piece = Piece(x, asyncio.get_running_loop().create_future())
        self.waiting.append(piece)
        self.arrived.set()
        return piece.words

    async def run(self):
        """Compute what waits, for ever."""
        while True:
            await self.arrived.wait()
            batch = self._next()
            if batch:
                await self._compute(batch)
            else:
                self.arrived.clear()

    def _next(self):
        """Take the next batch: the first that waits, and others if padding stays below half."""
        self.waiting = [p for p in self.waiting if not p.words.done()]
        batch, longest, total = [], 0, 0
        for piece in self.waiting:
            n = len(piece.x)
            if len(batch) == self.limits.batch:
                break
            if not batch or max(longest, n) * (len(batch) + 1) <= 2 * (total + n):
                batch.append(piece)
                longest, total = max(longest, n), total + n
        chosen = set(batch)
        self.waiting = [p for p in self.waiting if p not in chosen]
        self.metrics.waiting.set(len(self.waiting))
        return batch

    async def _compute(self, batch):
        try:
            found = await self.hear([p.x for p in batch])
        except Exception as error:
            if len(batch) > 1:  # so that one recording cannot spoil another
                for piece in batch:
                    await self._compute([piece])
            elif not batch[0].words.done():
                batch[0].words.set_exception(failure(error))
            return
        for piece, words in zip(batch, found, strict=True):
            if not piece.words.done():
                piece.words.set_result(words)

    async def hear(self, signals):
        """Signals, each (N,) at the model's rate -> their lists of words."""
        found = await self._in_model(self.recognizer.words, signals)
        self.metrics.batch.observe(len(signals))
        return found

    async def _compute_alone(self, function, *arguments):
        """`_in_model`, with an error as a client is told it."""
        try:
            return await self._in_model(function, *arguments)
        except Exception as error:
            raise failure(error) from None

    async def _in_model(self, function, *arguments):
        """Call in the model's thread, and count the seconds."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self.model, function, *arguments)
        self.metrics.compute_seconds.labels("file").inc(time.perf_counter() - started)
        return found

    def close(self):
        self.model.shutdown(wait=False, cancel_futures=True)
        self.decoders.shutdown(wait=False, cancel_futures=True)


def failure(error):
    """What a client is told of an error in the model."""
    if isinstance(error, UserError):  # it does not fit into memory
        return RefusedError(500, str(error))
    log.error("the model failed", exc_info=error)
    return RefusedError(500, "the model failed on this recording; the server's log tells how")
