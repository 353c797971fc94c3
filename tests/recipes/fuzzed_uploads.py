"""Sends malformed uploads to a real server until it does what it must not.

python -m tests.recipes.fuzzed_uploads EXAMPLES [random]

No answer but 200, 4xx and 503, or none to a request that was cut off; no hang; at the end no
place taken, no file left, no traceback in the log, and no more memory than a few uploads take.
"""

import contextlib
import os
import re
import socket
import sys
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.recipes.fuzzed_audio import damaged
from tests.recipes.packages import SENTENCES, said
from tests.server.servers import address, form, get, metric, post, shared, until
from tests.server.test_transcriptions import recording

MEMORY = 150  # MB that a server may grow by
PATIENCE = 30  # s for an answer: a hang is longer
ANSWERS = {200, *range(400, 500), 503}
GOOD = {kind: recording(said(SENTENCES[0]), kind)[1] for kind in ("wav", "flac", "ogg")}
BOUNDARY = "sep"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
CRLF = st.sampled_from(["\r\n"] * 60 + ["\n", "\r", "", "\r\n\r\n"])

junk = st.binary(max_size=60) | st.integers(1, 300_000).map(lambda n: b"\0" * n)
sounds = st.sampled_from(sorted(GOOD.values()))
places = st.one_of(st.integers(0, 64), st.integers(0, 1 << 16))
changes = st.lists(st.tuples(places, st.binary(min_size=1, max_size=6), st.booleans()), max_size=3)
contents = (
    junk
    | sounds
    | st.builds(damaged, sounds, changes, st.none() | places)
    | st.builds(damaged, sounds, changes, st.none() | places)
)
texts = st.text(max_size=12) | st.sampled_from(["true", "json", "verbose_json", "srt", "word", "é"])
names = st.sampled_from(
    ["file"] * 12
    + ["model", "response_format", "stream", "timestamp_granularities[]", "", "a" * 70_000, 'x"y']
)
dispositions = st.builds(
    lambda kind, name, file: f'{kind}; name="{name}"' + (f'; filename="{file}"' if file else ""),
    st.sampled_from(["form-data"] * 40 + ["attachment", "", "\0"]),
    names,
    st.sampled_from(
        ["a.wav", "../../etc/passwd", "a" * 5000, "\0", "é\u2028", "", r"\ud800", "+2AA-"]
    ),
)
headers = st.lists(
    st.sampled_from(
        [
            *["content-type: audio/wav"] * 20,
            "content-type: text/html; charset=utf-7",
            "content-transfer-encoding: base64",
            "no colon",
            ": empty",
            "x: " + "y" * 20_000,
            "content-disposition: form-data",
        ]
    ),
    max_size=2,
)


def part(disposition, more, end, content, separator):
    lines = [f"--{separator}", f"content-disposition: {disposition}", *more, "", ""]
    return end.join(lines).encode("utf-8", "replace") + content + end.encode()


parts = st.builds(
    part,
    dispositions,
    headers,
    CRLF,
    contents | contents | texts.map(lambda t: t.encode("utf-8", "replace")),
    st.sampled_from([BOUNDARY] * 40 + ["other"]),
)
wholes = st.builds(
    lambda found, count, end: b"".join(found) * count + end,
    st.lists(parts, min_size=1, max_size=3),
    st.sampled_from([1] * 20 + [2, 60]),
    st.sampled_from([b"--sep--\r\n"] * 30 + [b"", b"--sep", b"--sep-\r\n", b"--sep--" * 1000]),
)
kinds_of_answer = ["json", "verbose_json", "text", "srt", "vtt", "docx"]
fields = st.fixed_dictionaries(
    {},
    optional={
        "response_format": st.sampled_from(kinds_of_answer),
        "stream": st.sampled_from(["true", "false", "false", "maybe"]),
        "language": texts,
    },
)
forms = st.builds(lambda content, more: form(content, **more)[0], contents, fields)
broken = st.builds(damaged, wholes | forms, changes, st.none() | places)
# Mostly whole forms, or nothing but the parser would be tried.
chosen = st.sampled_from([forms] * 6 + [wholes] * 4 + [broken] * 3 + [contents])
bodies = chosen.flatmap(lambda strategy: strategy)
kinds = st.sampled_from(
    [MULTIPART] * 60
    + [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f'multipart/form-data; boundary="{BOUNDARY}',
        f"multipart/form-data; boundary={'s' * 70_000}",
        f"{MULTIPART}; charset=utf-16",
        *(
            f"{MULTIPART}; charset={name}"
            for name in ("nothing", "undefined", "idna", "utf-7", "raw_unicode_escape", "zip")
        ),
        "multipart/mixed; boundary=sep",
        "application/x-www-form-urlencoded",
        "application/json",
        "\xff\xfe",
        "",
    ]
)
framings = st.sampled_from(["length"] * 40 + ["chunked", "short", "long", "none", "twice", "wrong"])
extras = st.lists(
    st.sampled_from(["x: " + "y" * 100_000, "expect: 100-continue", "accept: \x01", "range: a"]),
    max_size=1,
)


def request(body, kind, framing, more):
    """The bytes of a request."""
    length = {"short": len(body) // 2, "long": len(body) + 1000, "wrong": "-1"}
    lines = ["POST /v1/audio/transcriptions HTTP/1.1", "host: x", "connection: close"]
    lines += [f"content-type: {kind}", *more]
    if framing == "chunked":
        lines.append("transfer-encoding: chunked")
        step = max(1, len(body) // 3)
        pieces = [body[i : i + step] for i in range(0, len(body), step)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    elif framing != "none":
        lines.append(f"content-length: {length.get(framing, len(body))}")
        if framing == "twice":
            lines.append("content-length: 7")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def answer(url, data, cut_off):
    """The status of the first answer, or None where the connection was closed without one.

    cut_off: close our side after the data; a server may take that for a client that has left.
    """
    with socket.create_connection(address(url), timeout=PATIENCE) as client:
        with contextlib.suppress(ConnectionError):  # it has answered before it read all
            client.sendall(data)
            if cut_off:
                client.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionError):
            while block := client.recv(65536):
                found += block
    status = re.match(rb"(?:HTTP/1.1 100[^\r]*\r\n\r\n)?HTTP/1.1 (\d+)", found)
    return status and int(status[1])


def memory(server):
    """MB that the process holds."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def fuzz(server, examples, seed=None):
    """Raise AssertionError for what it must not do; returns how often each status came."""
    for content in GOOD.values():  # what the first ones take
        assert post(server.url, content)[0] == 200
    before, counts = memory(server), {}

    @settings(
        max_examples=examples,
        deadline=None,  # `answer` has one
        derandomize=seed is None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies, kinds, framings, extras)
    @example(form(GOOD["flac"][:5000])[0], MULTIPART, "length", [])
    @example(form(b"no sound")[0], MULTIPART, "chunked", [])
    # What the parser's own errors do not cover.
    @example(form(b"x", "a.wav")[0], f"{MULTIPART}; charset=undefined", "length", [])
    @example(form(b"x", r"\ud800")[0], f"{MULTIPART}; charset=raw_unicode_escape", "length", [])
    @example(b"a=%", "application/x-www-form-urlencoded", "length", [])
    def send(body, kind, framing, more):
        status = answer(server.url, request(body, kind, framing, more), framing == "long")
        assert status in ANSWERS or (status is None and framing == "long"), f"answer {status}"
        counts[status] = counts.get(status, 0) + 1

    send()
    until(lambda: metric(server.url, "queue") == 0)
    assert server.process.poll() is None and get(f"{server.url}/health")[0] == 200
    until(lambda: not server.left())
    assert "Traceback" not in server.log(), server.log()[-3000:]
    assert memory(server) - before < MEMORY, f"it grew by {memory(server) - before:.0f} MB"
    assert post(server.url, GOOD["flac"])[2]["text"] == SENTENCES[0]
    return counts


if __name__ == "__main__":
    print(fuzz(shared(), int(sys.argv[1]), seed="random" if "random" in sys.argv else None))
