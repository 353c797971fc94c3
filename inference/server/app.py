"""The HTTP side of a server: routes, errors, the web page."""

import contextlib
import logging
import time
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from inference.server import streams
from inference.server.events import Events, events_of
from inference.server.limits import RefusedError
from inference.server.lingering import Lingering
from inference.server.replies import REPLIES, reply, wanted
from inference.server.service import bearer
from inference.server.uploads import received, told, unless_left

log = logging.getLogger("mamba_asr.server")
PAGE = Path(__file__).with_name("page")
GONE = 499  # a client that left; nobody reads it, the log and the metrics count it
# The page brings all that it needs, and nothing else may be loaded into it.
POLICY = "default-src 'self'; media-src blob:; connect-src 'self' ws: wss:; frame-ancestors 'none'"
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "model": {"type": "string", "description": "any; the server has one"},
        "response_format": {"enum": list(REPLIES), "default": "json"},
        "stream": {"type": "boolean", "default": False, "description": "events while it is heard"},
        "timestamp_granularities[]": {"type": "array", "items": {"enum": ["word", "segment"]}},
    },
}


def create_app(service):
    """Service -> the ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with service.running():
            yield

    # The interactive API pages would load scripts from elsewhere.
    app = FastAPI(title="Mamba-ASR", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Lingering)
    app.add_exception_handler(RefusedError, refusal)
    app.add_exception_handler(HTTPException, refusal_of_framework)
    add_state(app, service)
    add_transcriptions(app, service)

    @app.websocket("/v1/stream")
    async def stream(socket: streams.WebSocket):
        await streams.serve(socket, service)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": POLICY})

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def add_state(app, service):
    """What those who run the server ask; none of it needs a key."""

    @app.get("/health")
    async def health():
        return {"status": "alive"}

    @app.get("/ready")
    async def ready():
        state = {
            "ready": service.ready,
            "model": service.name,
            "sample_rate": service.recognizer.sample_rate,
            "streaming": service.cannot_stream is None,
            "key": service.api_key is not None,
        }
        return JSONResponse(state, status_code=200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics():
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def add_transcriptions(app, service):
    """What the OpenAI clients call."""

    @app.get("/v1/models")
    async def models(request: Request):
        service.check_key(bearer(request.headers))
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "mamba-asr"}
        return {"object": "list", "data": [model]}

    body = {"content": {"multipart/form-data": {"schema": FORM}}, "required": True}

    @app.post("/v1/audio/transcriptions", openapi_extra={"requestBody": body})
    async def transcriptions(request: Request):
        try:
            async with contextlib.AsyncExitStack() as stack:
                return await transcribed(request, service, stack)
        except ClientDisconnect:
            return Response(status_code=GONE)


async def transcribed(request, service, stack):
    """A request -> its answer; what it holds is in the stack. RefusedError, or ClientDisconnect."""
    call = stack.enter_context(Call(service))
    service.check_key(bearer(request.headers))
    stack.enter_context(service.slot("queue"))
    upload = await stack.enter_async_context(
        received(request, service.limits, service.folder, call.seconds)
    )
    how = wanted(upload.fields)
    if how.stream:
        events = events_of(request, service.batcher, upload, how, call)
        return Events(await anext(events), events, stack.pop_all())
    with told(upload, call.seconds):
        work = service.batcher.transcribe(upload.path)
        transcript = await unless_left(request, work, call.left)
    call.done(transcript)
    return reply(transcript, how)


class Call:
    """A request from its start to its end, for the metrics and the log; a context."""

    def __init__(self, service):
        self.service, self.seconds = service, service.limits.seconds
        self.started, self.status, self.heard, self.text = time.monotonic(), 500, 0.0, ""

    @property
    def left(self):
        """Seconds until it takes too long."""
        return self.seconds - (time.monotonic() - self.started)

    def done(self, transcript):
        self.status, self.heard = 200, transcript.duration
        self.text = self.service.said(transcript.text)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, RefusedError):
            self.status = error.status
        elif isinstance(error, ClientDisconnect):
            self.status = GONE
        seconds = time.monotonic() - self.started
        count(self.service.metrics, self.status, self.heard, seconds)
        said = (self.status, self.heard, seconds, self.text)
        log.info("transcription %d: %.2f s of audio in %.2f s%s", *said)


def count(metrics, status, heard, seconds):
    metrics.requests.labels(str(status)).inc()
    metrics.request_seconds.observe(seconds)
    metrics.audio_seconds.labels("file").inc(heard)
    if heard:
        metrics.real_time_factor.observe(seconds / heard)


async def refusal(_, error):
    """RefusedError as an answer."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def refusal_of_framework(request, error):
    """What FastAPI and Starlette refuse, worded alike."""
    return await refusal(request, RefusedError(error.status_code, str(error.detail)))
