"""stream=true: a transcript in server-sent events while it is heard, as OpenAI's API sends them.

transcript.text.delta   what comes to the text, words that stay as they are
transcript.text.done    the whole text, that of an answer without stream
"""

import asyncio
import contextlib
import json

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from inference.server.limits import RefusedError
from inference.server.replies import answer, words_of
from inference.server.uploads import told, unless_left

DELTA, DONE = "transcript.text.delta", "transcript.text.done"


class Events(Response):
    """An answer that goes on: `first`, then `events`; whatever ends it, `stack` is closed."""

    media_type = "text/event-stream"

    def __init__(self, first, events, stack):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first, self.events, self.stack = first, events, stack

    async def __call__(self, scope, receive, send):
        with contextlib.suppress(ClientDisconnect):
            async with self.stack, contextlib.aclosing(self.events):
                start = {"status": self.status_code, "headers": self.raw_headers}
                await send({"type": "http.response.start", **start})
                await send(body(self.first))
                async for event in self.events:
                    await send(body(event))
                await send({"type": "http.response.body", "body": b""})


def body(event):
    data = json.dumps(event, ensure_ascii=False)
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


async def events_of(request, batcher, upload, how, call):
    """Yield the events of an upload, a `Call` at work.

    ClientDisconnect when the client leaves. RefusedError for what goes wrong before the first
    event; after it, that is the last event.
    """
    news, text, begun = asyncio.Queue(), Text(how), False

    async def hear():
        try:
            return await batcher.transcribe(upload.path, lambda *words: news.put_nowait(words))
        finally:
            news.put_nowait(None)

    task = asyncio.ensure_future(hear())
    try:
        with told(upload, call.seconds):
            while (words := await unless_left(request, news.get(), call.left)) is not None:
                if event := text.event(*words):
                    begun = True
                    yield event
            transcript = await task
        if event := text.event(transcript.words, ()):
            yield event
        call.done(transcript)
        yield {"type": DONE, **answer(transcript, how)}
    except RefusedError as error:
        if not begun:
            raise
        call.status = error.status
        yield error.body
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Text:
    """What a client has been told of a transcript."""

    def __init__(self, how):
        self.with_words = how.form == "verbose_json" and "word" in how.granularities
        self.told, self.shown = 0, ()

    def event(self, stay, maybe):
        """Words that stay as they are, all so far, and those after them -> an event, or None."""
        new = stay[self.told :]
        if not new and (not self.with_words or list(maybe) == list(self.shown)):
            return None
        delta = " ".join(w.text for w in new)
        event = {"type": DELTA, "delta": f" {delta}" if self.told and new else delta}
        if self.with_words:
            event |= {"words": words_of(new), "maybe": words_of(maybe)}
        self.told, self.shown = self.told + len(new), maybe
        return event
