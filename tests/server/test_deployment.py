"""docs/deployment.md: every command and every program in it is run."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import soundfile as sf

import serve
from tests.recipes import runs
from tests.recipes.causal import causal_package, speech
from tests.recipes.packages import RATE
from tests.server.images import stages
from tests.server.servers import free_port, status, until
from tests.test_docs import FENCE, commands

PAGE = runs.ROOT / "docs/deployment.md"
TEXTS = speech(2)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the guide's reader has it."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("serve.py", "inference", "modules"):
        (folder / name).symlink_to(runs.ROOT / name)
    (folder / "packages").mkdir()
    (folder / "packages" / "conmamba").symlink_to(causal_package())
    sf.write(folder / "speech.flac", speech(2)[0], RATE)
    return folder


def written(program):
    return [words for words in commands(PAGE) if program in words[:2]]


def run(words, place, **more):
    return subprocess.run(
        words, cwd=place, env=runs.environment(), capture_output=True, text=True, check=True, **more
    ).stdout


def started(line, place, port):
    """A serve.py line of the guide, on a port of its own, when it is ready."""
    settings = dict(w.split("=", 1) for w in shlex.split(line) if re.match(r"[A-Z_]+=", w))
    words = [w for w in shlex.split(line) if not re.match(r"[A-Z_]+=", w)]
    assert words[0] == "python"
    process = subprocess.Popen(
        [sys.executable, *words[1:], "--port", str(port)],
        cwd=place,
        env=runs.environment(**settings),
        stderr=subprocess.PIPE,
    )
    until(lambda: process.poll() is not None or status(f"http://127.0.0.1:{port}/ready") == 200)
    assert process.poll() is None, process.stderr.read().decode()
    return process


def lines(beginning):
    found = re.findall(rf"^(?:[A-Z_]+=\S+ )*{re.escape(beginning)}.*$", PAGE.read_text(), re.M)
    assert found
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server_and_what_is_asked_of_it(place):
    plain, keyed = lines("python serve.py --model")
    port = free_port()
    with started(plain, place, port) as server:
        for words in written("curl"):
            out = run([w.replace("8000", str(port)) for w in words], place)
            assert all(text in out for text in TEXTS)
            assert ("-->" in out) == ("response_format=srt" in words)
        programs = [
            block for language, block in FENCE.findall(PAGE.read_text()) if language == "python"
        ]
        assert len(programs) == 3
        for program in programs:
            out = run([sys.executable, "-c", program.replace("8000", str(port))], place)
            assert all(word in out for text in TEXTS for word in text.split())
        server.terminate()
        assert server.wait(30) == 0
    with started(keyed, place, port) as server:
        ask = [
            "curl",
            "-s",
            "-F",
            "file=@speech.flac",
            f"http://127.0.0.1:{port}/v1/audio/transcriptions",
        ]
        assert "key is missing" in run(ask, place)
        assert TEXTS[0] in run([*ask, "-H", "Authorization: Bearer secret"], place)
        server.terminate()


def test_the_help(monkeypatch, capsys):
    (line,) = re.findall(r"`python (serve.py --help)`", PAGE.read_text())
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit):
        serve.main()
    assert "--max-queue" in capsys.readouterr().out


def test_what_is_installed_is_what_the_image_installs():
    ((_, *words),) = written("pip")
    steps = [
        text for name, text in stages(runs.ROOT / "Dockerfile")[1]["server"][1] if name == "RUN"
    ]
    assert f"python -m pip {shlex.join(words)}" in [shlex.join(shlex.split(s)) for s in steps]


# ---- Docker, as far as a Dockerfile can be read ----


def docker():
    """The options that the guide gives to docker."""
    p = argparse.ArgumentParser(exit_on_error=False)
    actions = p.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build")
    build.add_argument("-t", required=True)
    build.add_argument("--build-arg", action="append", default=[])
    build.add_argument("--target", default="the last")
    build.add_argument("context", choices=["."])
    start = actions.add_parser("run")
    start.add_argument("--rm", action="store_true")
    for option in ("-p", "-v", "-e", "--gpus"):
        start.add_argument(option)
    start.add_argument("image")
    return p


def test_docker_commands_fit_the_dockerfile(place):
    before, found = stages(runs.ROOT / "Dockerfile")
    declared = {t.partition("=")[0] for n, t in before if n == "ARG"}
    declared |= {t.partition("=")[0] for _, steps in found.values() for n, t in steps if n == "ARG"}
    baked = {}
    for words in written("docker"):
        given = docker().parse_args(words[1:])
        if given.action == "build":
            values = dict(a.split("=", 1) for a in given.build_arg)
            assert values.keys() <= declared and given.target in found
            assert (place / values.get("MODEL", ".")).is_dir()
            baked[given.t] = given.target == "baked"
        else:
            assert given.p == "8000:8000"
            assert baked[given.image] == (given.v is None)
            if given.v:
                source, target, mode = given.v.split(":")
                assert os.path.isdir(source.replace("$PWD", str(place)))
                assert (target, mode) == ("/model", "ro")
    assert len(baked) == 3
