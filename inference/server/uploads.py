"""A request's body -> its fields, and a file that lasts as long as the request."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from inference.recording import EmptyAudioError
from inference.server.limits import MB, RefusedError
from modules.errors import UserError

ROOM = 64 * 1024  # bytes of a form besides its file


@dataclass(frozen=True)
class Upload:
    """A form: `fields` as (name, value) pairs, the recording's `name` there and `path` here."""

    fields: list[tuple[str, str]]
    name: str
    path: Path


@contextlib.asynccontextmanager
async def received(request, limits, folder, seconds):
    """An Upload whose file is in `folder` until the context ends.

    RefusedError when it is too large, too slow or no form with a file; ClientDisconnect when the
    client leaves.
    """
    with contextlib.ExitStack() as stack:
        try:
            form = await asyncio.wait_for(parsed(request, limits), seconds)
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the upload took longer than {limits.seconds:g} s") from None
        except OSError as error:
            raise no_room(error) from None
        try:
            yield await asyncio.to_thread(store, form, limits, folder, stack)
        finally:
            await form.close()


async def parsed(request, limits):
    """The form of a request; RefusedError as soon as it is too large."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.upload + ROOM:
        raise too_large(limits)
    count = 0

    async def receive():
        nonlocal count
        message = await request.receive()
        count += len(message.get("body", b""))
        if count > limits.upload + ROOM:  # of a body whose length was not declared
            raise too_large(limits)
        return message

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise no_form("the content type is not multipart/form-data")
    try:
        return await Request(request.scope, receive).form(max_files=1, max_fields=50)
    except HTTPException as error:
        raise no_form(error.detail) from None
    except ValueError as error:  # of a charset that is none of text
        raise no_form(error) from None


def store(form, limits, folder, stack):
    """Write the form's file to a path of its own, which the stack removes."""
    file = form.get("file")
    if file is None or isinstance(file, str):
        raise no_form("there is no field file with a file name")
    if file.size > limits.upload:
        raise too_large(limits)
    if not file.size:
        raise RefusedError(422, "the file is empty, 0 bytes; give a recording")
    handle, path = tempfile.mkstemp(prefix="upload-", dir=folder)
    stack.callback(os.unlink, path)
    try:
        with os.fdopen(handle, "wb") as target:
            shutil.copyfileobj(file.file, target)
    except OSError as error:
        raise no_room(error) from None
    fields = [(plain(k), plain(v)) for k, v in form.multi_items() if isinstance(v, str)]
    return Upload(fields, plain(file.filename) or "the file", Path(path))


def plain(text):
    """Text that can be sent back: some charsets decode to half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def no_form(why):
    return RefusedError(
        400, f"this is no form with a recording ({why}); curl -F file=@speech.flac sends one"
    )


def too_large(limits):
    return RefusedError(
        413,
        f"the recording is larger than the {limits.upload / MB:g} MB that this server takes; "
        "compress it (flac, ogg, mp3), or cut it",
    )


def no_room(error):
    return RefusedError(507, f"this server cannot store the recording: {error.strerror}")


@contextlib.contextmanager
def told(upload, seconds):
    """What goes wrong with an upload that is heard, as RefusedError in the client's words."""
    try:
        yield
    except asyncio.TimeoutError:
        raise RefusedError(
            504, f"it took longer than {seconds:g} s; send shorter recordings"
        ) from None
    except UserError as error:
        status = 422 if isinstance(error, EmptyAudioError) else 415
        raise RefusedError(status, str(error).replace(str(upload.path), upload.name)) from None


async def unless_left(request, work, seconds):
    """The result of a coroutine, which is cancelled when the client leaves or time is over."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise asyncio.TimeoutError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def left(request):
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
