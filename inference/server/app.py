"""The HTTP side of a server: routes, errors, the web page."""

import asyncio
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

from inference.audio import EmptyAudioError
from inference.server import streams
from inference.server.limits import RefusedError
from inference.server.replies import REPLIES, reply, wanted
from inference.server.service import bearer
from inference.server.uploads import received, unless_left
from modules.errors import UserError

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
        started, status, heard, text = time.monotonic(), 500, 0.0, ""
        try:
            service.check_key(bearer(request.headers))
            with service.slot("queue"):
                transcript, how = await transcribed(request, service, started)
            status, heard, text = 200, transcript.duration, service.said(transcript.text)
            return reply(transcript, how)
        except RefusedError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = GONE
            return Response(status_code=GONE)
        finally:
            seconds = time.monotonic() - started
            count(service.metrics, status, heard, seconds)
            log.info("transcription %d: %.2f s of audio in %.2f s%s", status, heard, seconds, text)


async def transcribed(request, service, started):
    """A request -> its Transcript, and how it is wanted; RefusedError, or ClientDisconnect."""
    limits = service.limits
    async with received(request, limits, service.folder, limits.seconds) as upload:
        how = wanted(upload.fields)
        left = limits.seconds - (time.monotonic() - started)
        try:
            work = service.batcher.transcribe(upload.path)
            return await unless_left(request, work, left), how
        except asyncio.TimeoutError:
            raise RefusedError(
                504, f"it took longer than {limits.seconds:g} s; send shorter recordings"
            ) from None
        except EmptyAudioError as error:
            raise RefusedError(422, named(error, upload)) from None
        except UserError as error:
            raise RefusedError(415, named(error, upload)) from None


def named(error, upload):
    """A message with the client's name of the file in place of ours."""
    return str(error).replace(str(upload.path), upload.name)


def count(metrics, status, heard, seconds):
    metrics.requests.labels(str(status)).inc()
    metrics.request_seconds.observe(seconds)
    metrics.audio_seconds.labels("file").inc(heard)
    if heard:
        metrics.real_time_factor.observe(seconds / heard)


async def refusal(_, error):
    """RefusedError as the OpenAI API words an error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body = {"message": error.message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=error.status, headers=error.headers)


async def refusal_of_framework(request, error):
    """What FastAPI and Starlette refuse, worded alike."""
    return await refusal(request, RefusedError(error.status_code, str(error.detail)))
