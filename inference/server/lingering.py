"""An answer that comes before the whole request was read, so that the client gets to see it.

A socket that is closed with bytes nobody read resets the connection: a client that still sends
fails with a broken pipe and never reads why. So what comes is read and thrown away before the
answer ends, as nginx's `lingering_close` does.
"""

import asyncio
import contextlib
import time

SECONDS = 30.0  # in all
IDLE = 5.0  # without a byte


class Lingering:
    """ASGI middleware: `app`, whose answers end when the request was read."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not comes_unasked(scope["headers"]):
            return await self.app(scope, receive, send)
        unread = True

        async def receive_and_note():
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)  # which none of a disconnection has
            return message

        async def send_and_linger(message):
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (last and unread):
                return await send(message)
            await send({**message, "more_body": True})
            end = time.monotonic() + SECONDS
            with contextlib.suppress(asyncio.TimeoutError):
                while unread and (left := end - time.monotonic()) > 0:
                    await asyncio.wait_for(receive_and_note(), min(IDLE, left))
            await send({"type": "http.response.body", "body": b""})

        await self.app(scope, receive_and_note, send_and_linger)


def comes_unasked(headers):
    """Whether a request has a body that its client sends without waiting to be asked for it."""
    found = dict(headers)
    length = found.get(b"content-length", b"0")
    return (length != b"0" or b"transfer-encoding" in found) and b"expect" not in found
