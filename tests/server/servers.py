"""Servers on ports that the system chooses: processes as users start them, and in this process."""

import atexit
import contextlib
import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from inference import Recognizer
from inference.server.app import create_app
from inference.server.process import Server
from inference.server.service import Service
from tests.recipes import runs
from tests.recipes.causal import causal_package

WAIT = 60  # s that anything may take on a busy machine


class Process:
    """serve.py on its own, ready: `url`, `log()`, `stop()`."""

    def __init__(self, model, *options, **environment):
        self.folder = Path(tempfile.mkdtemp(prefix="mamba-asr-serve-"))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.output = self.folder / "log"
        arguments = ["serve.py", "--model", str(model), "--port", "0", *map(str, options)]
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stderr=output,
                stdout=output,
                cwd=runs.ROOT,
                env=runs.environment(TMPDIR=str(self.temporary), **environment),
            )
        atexit.register(self.stop)
        until(lambda: self.process.poll() is not None or "http://" in self.log())
        self.url = re.search(r"http://[\w.]+:\d+", self.log())[0]
        until(lambda: status(f"{self.url}/ready") == 200)

    def log(self):
        return self.output.read_text()

    def left(self):
        """What lies in its temporary folder."""
        return [p for p in self.temporary.rglob("*") if p.is_file()]

    def stop(self, number=signal.SIGTERM):
        """The exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(WAIT)
        finally:
            self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def shared():
    """One process with a causal model for every test that leaves it as it was."""
    return Process(causal_package())


@functools.cache
def recognizer():
    """The same model, for servers in this process."""
    return Recognizer.from_folder(causal_package(), "cpu")


@contextlib.contextmanager
def served(model=None, early=None, **options):
    """A server in a thread of this process: yields its Service, with its `url`, when it is warm.

    early: called with the Service before that.
    """
    import uvicorn

    service = Service(model or recognizer(), "tiny", **options)
    listening = socket.create_server(("127.0.0.1", 0))
    service.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(create_app(service), http="h11", log_config=None, access_log=False)
    server = Server(config, service, drain_seconds=10)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    service.stop = lambda: setattr(server, "should_exit", True)
    try:
        if early is not None:
            early(service)
        until(lambda: service.warm)
        yield service
    finally:
        service.stop()
        thread.join(WAIT)
        assert not thread.is_alive()


def until(condition, seconds=WAIT):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def status(url):
    try:
        return get(url)[0]
    except OSError:
        return None


def get(url, **headers):
    """Status, headers and body."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def metric(url, name):
    """A number of /metrics, 0 if it is not there yet."""
    text = get(f"{url}/metrics")[2].decode()
    found = re.search(rf"^mamba_asr_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def form(content, name="a.wav", boundary="sep", **fields):
    """A multipart body and its content type."""
    parts = [
        f'--{boundary}\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode(
            "utf-8", "replace"
        )
        for k, v in fields.items()
    ]
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    body = b"".join([*parts, head.encode(), content, f"\r\n--{boundary}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={boundary}"


def post(url, content, name="a.wav", **fields):
    """Status, headers and JSON of a transcription request."""
    body, kind = form(content, name, **fields)
    request = urllib.request.Request(
        f"{url}/v1/audio/transcriptions", data=body, headers={"content-type": kind}
    )
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def begin(url, content, sent=1.0):
    """A client, as a socket, that has sent this share of a transcription request."""
    body, kind = form(content)
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    client = socket.create_connection(address(url), WAIT)
    client.sendall(f"{head}content-type: {kind}\r\n\r\n".encode() + body[: int(len(body) * sent)])
    return client


def address(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]
