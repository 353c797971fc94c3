"""serve.py as a process: its signals, its mistakes, its help."""

import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import serve as script
from tests.recipes.causal import causal_package, speech
from tests.server.servers import Process, begin, form, metric, post, status, until
from tests.server.test_transcriptions import recording


def call(monkeypatch, capsys, *arguments, status=2):
    """serve.py in this process: what it wrote to stderr, or stdout."""
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == status
    shown = capsys.readouterr()
    return shown.err or shown.out


def test_sigterm_lets_what_runs_end():
    server = Process(causal_package(), "--log-transcripts", "--batch-size", 1)
    x, _ = speech(6)
    long = recording(np.tile(x, 2))[1]
    with ThreadPoolExecutor(2) as clients, begin(server.url, long, 0.5) as sending:
        until(lambda: metric(server.url, "queue") == 1)
        running = [clients.submit(post, server.url, long) for _ in range(2)]
        until(lambda: metric(server.url, "queue") == 3)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: status(f"{server.url}/ready") == 503)  # to whoever comes now
        answer, headers, _ = post(server.url, long)
        assert answer == 503 and int(headers["Retry-After"]) > 0
        found = [r.result() for r in running]
        assert server.process.poll() is None  # it waits for the upload
        body = form(long)[0]
        sending.sendall(body[len(body) // 2 :])
        assert sending.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.process.wait(60) == 0
    assert [f[0] for f in found] == [200] * 2
    assert len({f[2]["text"] for f in found}) == 1 and len(found[0][2]["text"]) > 100
    log = server.log()
    assert "stopping; 3 requests and 0 streams may end" in log
    assert found[0][2]["text"][:50] in log  # it was told to log what was said
    assert "Traceback" not in log
    assert not list(server.temporary.iterdir())
    server.stop()


def test_mistakes_are_told_before_it_serves(monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "foreign").write_text("schlüssel", encoding="utf-8")
    (tmp_path / "a.onnx").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for message, *arguments in (
            ("there is no folder nowhere", "--model", "nowhere", "--port", 0),
            ("a.onnx is a file, and here a package", "--model", tmp_path / "a.onnx", "--port", 0),
            (f"--port {port}: Address already in use", "--model", causal_package(), "--port", port),
            ("--host 192.0.2.1", "--model", causal_package(), "--host", "192.0.2.1"),
            ("--port 99999", "--model", causal_package(), "--port", 99999),
            ("the limit queue=0 lets nothing through", "--model", "x", "--max-queue", 0),
            ("the limit upload=0 lets nothing", "--model", "x", "--max-upload-mb", 0),
            ("--api-key-file none: No such file", "--model", "x", "--api-key-file", "none"),
            ("is empty; write a key", "--model", "x", "--api-key-file", tmp_path / "empty"),
            ("letters that are not ASCII", "--model", "x", "--api-key-file", tmp_path / "foreign"),
            (
                "device='tpu' is unknown",
                "--model",
                causal_package(),
                "--device",
                "tpu",
                "--port",
                0,
            ),
            ("--threads: '0' must be", "--model", "x", "--threads", 0),
            ("'nan' must be a number", "--model", "x", "--max-upload-mb", "nan"),
        ):
            shown = call(monkeypatch, capsys, *arguments)
            assert message in shown and "Traceback" not in shown


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(
        "inference.server.find_spec", lambda name: name if name != "uvicorn" else None
    )
    shown = call(monkeypatch, capsys, "--model", "x")
    assert "serving needs uvicorn; `pip install '.[serve]'`" in shown


def test_help_teaches(monkeypatch, capsys):
    shown = call(monkeypatch, capsys, "--help", status=0)
    for wanted in ("examples:", "curl", "exit status", "package.py", "/v1/stream", "(25)", "(120)"):
        assert wanted in shown
