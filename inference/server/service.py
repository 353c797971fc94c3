"""What all connections of a server share: the model, its queue, its limits, its state."""

import asyncio
import contextlib
import hmac
import logging
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from inference.server.batching import Batcher
from inference.server.limits import Limits, RefusedError
from inference.server.metrics import Metrics
from inference.streaming import StreamingRecognizer
from inference.streaming_ctc import check_streams
from modules.errors import UserError

log = logging.getLogger("mamba_asr.server")
RETRY = 2  # s after which a client whom there was no room for may come again


class Service:
    """A recogniser that is served.

    Arguments
    ---------
    recognizer : Recognizer
    name : str
        Of the model, for clients.
    limits : Limits
    api_key : str or None
        What requests under /v1 must bring; None: nothing.
    log_transcripts : bool
        Write what was said to the log.
    """

    def __init__(self, recognizer, name, limits=None, api_key=None, log_transcripts=False):
        self.recognizer, self.name, self.limits = recognizer, name, limits or Limits()
        self.api_key, self.log_transcripts = api_key, log_transcripts
        self.metrics = Metrics()
        self.batcher = Batcher(recognizer, self.limits, self.metrics)
        self.streaming = ThreadPoolExecutor(self.limits.streams, thread_name_prefix="stream")
        self.warm, self.draining = False, asyncio.Event()
        self.open = {"queue": 0, "streams": 0}
        try:
            check_streams(recognizer)
            self.cannot_stream = None
        except UserError as error:
            self.cannot_stream = str(error)

    @contextlib.asynccontextmanager
    async def running(self):
        """The queue at work, and a folder for uploads, which goes at the end."""
        with tempfile.TemporaryDirectory(prefix="mamba-asr-") as folder:
            self.folder = Path(folder)
            tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self._warm_up())]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                self.batcher.close()
                self.streaming.shutdown(wait=False, cancel_futures=True)

    async def _warm_up(self):
        """The first calls of all are slow: make them before anybody waits."""
        try:
            await self.batcher.hear([0.01 * torch.randn(self.recognizer.sample_rate)] * 2)
            if self.cannot_stream is None:
                await self.in_stream(self.stream)
        except Exception:  # nobody awaits this task
            log.exception("the model failed on the first calls: this server does not get ready")
            return
        self.warm = True
        self.metrics.ready.set(1)

    @property
    def ready(self):
        return self.warm and not self.draining.is_set()

    def drain(self):
        """Take nothing new, and let live streams end."""
        self.draining.set()
        self.metrics.ready.set(0)

    def check_key(self, given):
        """RefusedError unless a client's key is ours."""
        if self.api_key is None:
            return
        given = (given or "").encode(errors="replace")
        if not hmac.compare_digest(given, self.api_key.encode()):
            raise RefusedError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY"
            )

    @contextlib.contextmanager
    def slot(self, kind):
        """One of the limited places, `queue` or `streams`; RefusedError when there is none."""
        if self.draining.is_set():
            raise RefusedError(503, "this server is going down; try again", retry_after=RETRY)
        most = getattr(self.limits, kind)
        if self.open[kind] >= most:
            raise RefusedError(503, f"all {most} places are taken; try again", retry_after=RETRY)
        gauge = getattr(self.metrics, kind)
        self.open[kind] += 1
        gauge.inc()
        try:
            yield
        finally:
            self.open[kind] -= 1
            gauge.dec()

    def stream(self, endpoint_seconds=None):
        """A new live stream; the weights are shared."""
        return StreamingRecognizer(
            self.recognizer, endpoint_seconds=endpoint_seconds, history=False
        )

    async def in_stream(self, function, *arguments):
        """Call in a thread of the streams, and count the seconds."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self.streaming, function, *arguments)
        self.metrics.compute_seconds.labels("stream").inc(time.perf_counter() - started)
        return result

    def said(self, text):
        """What was said, for the log if that is wanted."""
        return f" {text!r}" if self.log_transcripts else ""


def bearer(headers):
    """The key of an Authorization header, or None."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None
