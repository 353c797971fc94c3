"""WS /v1/stream: samples come in binary messages, partial and final text goes back as JSON.

client  {"type": "start", "sample_rate": 48000, "format": "s16le", "endpoint_seconds": 0.8}
        and samples, mono
server  {"type": "ready", ...}
server  {"type": "partial" | "final", "text", "start", "end", "words"} as often as there is news
client  {"type": "finish"}
server  the last final, {"type": "done", "duration": 12.3}, and closes
"""

import asyncio
import json
import logging

import torch
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from inference.audio import Resampler
from inference.formats import rounded
from inference.server.limits import RefusedError
from inference.server.service import bearer
from inference.sources import PACKET
from inference.transcript import Final
from modules.errors import UserError

log = logging.getLogger("mamba_asr.server")
FORMATS = {"s16le": (torch.int16, 2**15), "f32le": (torch.float32, 1)}
# Closing codes of RFC 6455 for what HTTP has a status for.
CODES = {400: 1007, 401: 1008, 408: 1008, 415: 1003, 500: 1011, 503: 1013}
RESTART = 1012
ENDPOINT = 0.8  # s of a pause that ends a segment, unless the client says otherwise
LONGEST = 3600  # s of such a pause
LONGEST_REASON = 123  # bytes


async def serve(socket: WebSocket, service):
    """One connection, from its start to its end."""
    await socket.accept()
    try:
        start = await hello(socket, service)
        # From the header, or from the start: browsers cannot set headers here.
        service.check_key(bearer(socket.headers) or str(start.get("api_key") or ""))
        if service.cannot_stream is not None:
            raise RefusedError(415, service.cannot_stream)
        with service.slot("streams"):
            await Session(socket, service, start).run()
    except RefusedError as error:
        await close(socket, CODES[error.status], error.message)
    except WebSocketDisconnect:
        pass
    except Exception:
        log.exception("a stream failed")
        await close(socket, CODES[500], "the model failed; the server's log tells how")


async def hello(socket, service):
    """The first message of a client, as a dict; RefusedError when it is no start."""
    message = await next_message(socket, service)
    try:
        start = json.loads(message.get("text") or "")
    except (ValueError, RecursionError):
        start = None
    if not isinstance(start, dict) or start.get("type") != "start":
        raise RefusedError(400, 'the first message is no {"type": "start", "sample_rate": 16000}')
    return start


async def next_message(socket, service):
    """RefusedError when none comes; WebSocketDisconnect when the client has left."""
    try:
        message = await asyncio.wait_for(socket.receive(), service.limits.idle)
    except asyncio.TimeoutError:
        raise RefusedError(408, f"nothing came for {service.limits.idle:g} s") from None
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    return message


async def close(socket, code, message):
    """Tell why, in a message and in the close frame, which is short."""
    message = message.encode(errors="backslashreplace").decode()  # JSON may hold half a character
    try:
        await socket.send_json({"type": "error", "message": message})
        reason = message.encode()[:LONGEST_REASON].decode(errors="ignore")
        await socket.close(code, reason)
    except (WebSocketDisconnect, RuntimeError):  # it left meanwhile
        pass


class Session:
    """A live stream: decodes, resamples, hears and answers."""

    def __init__(self, socket, service, start):
        self.socket, self.service = socket, service
        self.rate = start.get("sample_rate", service.recognizer.sample_rate)
        if type(self.rate) is not int or not 1000 <= self.rate <= 400_000:
            raise RefusedError(400, f"sample_rate={self.rate!r} is no rate of speech; give 16000")
        self.format = start.get("format", "s16le")
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise RefusedError(
                400, f"format={self.format!r} is unknown; give {' or '.join(FORMATS)}"
            )
        self.endpoint = start.get("endpoint_seconds", ENDPOINT)
        if type(self.endpoint) not in (int, float) or not 0 <= self.endpoint <= LONGEST:
            raise RefusedError(
                400, f"endpoint_seconds={self.endpoint!r} is no pause; give {ENDPOINT}, or 0: none"
            )
        self.resampler = Resampler(self.rate, service.recognizer.sample_rate, PACKET)
        self.heard, self.shown = 0, ""

    async def run(self):
        """Hear until the client finishes or leaves, or the server goes down."""
        self.stream = await self.service.in_stream(self.service.stream, self.endpoint or None)
        await self.socket.send_json(
            {
                "type": "ready",
                "sample_rate": self.stream.sample_rate,
                "chunk_seconds": self.stream.chunk_seconds,
                "lookahead_seconds": round(self.stream.lookahead_seconds, 4),
            }
        )
        try:
            finished = await self._hear()
            await self._finish()
        finally:
            self.service.metrics.audio_seconds.labels("stream").inc(self.duration)
            log.info("stream: %.2f s of audio", self.duration)
        if finished:
            await self.socket.close()
        else:
            await self.socket.close(RESTART, "this server goes down; connect again")

    @property
    def duration(self):
        return self.heard / self.rate

    async def _hear(self):
        """Whether the client finished; otherwise the server goes down."""
        down = asyncio.ensure_future(self.service.draining.wait())
        try:
            while True:
                coming = asyncio.ensure_future(next_message(self.socket, self.service))
                await asyncio.wait({coming, down}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    return False
                message = coming.result()
                if message.get("bytes") is None:
                    check_finish(message.get("text"))
                    return True
                await self._send(await self.service.in_stream(self._push, message["bytes"]))
        finally:
            down.cancel()

    def _push(self, data):
        """Raw samples -> the messages that they give."""
        try:
            x = samples(data, self.format)
            self.heard += len(x)
            return [m for y in self.resampler.push(x) for m in self._news(self.stream.push(y))]
        except UserError as error:
            raise RefusedError(400, str(error)) from None

    def _news(self, partial):
        for final in partial.finals:
            yield message("final", final)
        if partial.text != self.shown and partial.words:
            yield message("partial", final_of(partial.words))
        self.shown = partial.text

    async def _finish(self):
        def finish():
            found = [m for y in self.resampler.finish() for m in self._news(self.stream.push(y))]
            words = self.stream.finish().words
            return [*found, message("final", final_of(words))] if words else found

        await self._send(await self.service.in_stream(finish))
        await self.socket.send_json({"type": "done", "duration": round(self.duration, 3)})

    async def _send(self, messages):
        for m in messages:
            if m["type"] == "final" and self.service.log_transcripts:
                log.info("stream: %r", m["text"])
            await self.socket.send_json(m)


def check_finish(text):
    """RefusedError for a text message that is no finish."""
    try:
        kind = json.loads(text)["type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        kind = None
    if kind != "finish":
        raise RefusedError(400, 'send samples in binary messages, then {"type": "finish"}')


def samples(data, form):
    """Bytes -> (N,) float32; UserError for a part of a sample."""
    dtype, scale = FORMATS[form]
    if len(data) % dtype.itemsize:
        raise UserError(f"{len(data)} bytes are no whole number of {form} samples; send whole ones")
    if not data:
        return torch.zeros(0)
    return torch.frombuffer(bytearray(data), dtype=dtype).float() / scale


def final_of(words):
    return Final(" ".join(w.text for w in words), words[0].start, words[-1].end, words)


def message(kind, final):
    """A segment as the message that stream.py writes too."""
    return {"type": kind, **rounded(final), "words": [rounded(w) for w in final.words]}
