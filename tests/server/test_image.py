"""The Dockerfile: its steps run in a scratch folder, and what they make serves."""

import importlib.metadata
import re
import shutil
import subprocess
import sys

import pytest

from tests.recipes import runs
from tests.recipes.causal import causal_package
from tests.recipes.packages import SENTENCES, said
from tests.server.images import Image, stages
from tests.server.servers import free_port, post, status, until
from tests.server.test_transcriptions import recording


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A checkout with a package to bake."""
    folder = tmp_path_factory.mktemp("context")
    for name in ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(runs.ROOT / name, folder)
    for path in (*runs.ROOT.glob("*.py"), *runs.ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)
    for name in ("modules", "inference"):
        shutil.copytree(runs.ROOT / name, folder / name)
    shutil.copytree(causal_package(), folder / "packages" / "tiny")
    (folder / "secret.txt").write_text("not for images")
    return folder


def programs(folder, alone):
    """PATH with a Python of its own if it is `alone`, else this one without its pip; useradd."""
    programs = folder / "bin"
    if alone:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    else:
        script(programs / "python", f'[ "$2" = pip ] || exec {sys.executable} "$@"\n{NOTE}')
    script(programs / "useradd", NOTE)
    return f"{programs}:/usr/local/bin:/usr/bin:/bin"


NOTE = 'echo "$@" >> "$HOME/noted"\n'  # what it was asked to do


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "alone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "downloaded"]
)
def test_a_baked_image_serves(context, tmp_path, alone):
    """Quick: on what is installed here. Downloaded: on what its pip installs, some minutes."""
    root, path = tmp_path / "root", programs(tmp_path / "programs", alone)
    image = Image(context, root, path, "baked", TORCH_INDEX="", MODEL="packages/tiny")
    assert [image.stages[s][0] for s in ("baked", "server")] == ["server", "python:${PYTHON}"]
    noted = (root / "noted").read_text().splitlines()
    assert "--uid 10001" in noted[-1]
    assert image.user == "10001"  # no root
    if not alone:
        torch = re.findall(r"^torch.*", (runs.ROOT / "requirements.txt").read_text(), re.M)
        assert noted[0].split() == ["-m", "pip", "install", *torch]
        assert noted[1] == "-m pip install .[serve,audio]"
    kept = {p.name for p in (root / "app").iterdir()}
    made = {"build", "mamba_asr.egg-info"}  # by pip
    copied = {"LICENSE", "pyproject.toml", "requirements.txt", "serve.py", "transcribe.py"}
    assert kept - made == copied | {"modules", "inference"}
    assert not list(root.rglob("__pycache__"))
    serves(image, free_port())


def serves(image, port):
    """Start it as an engine would, with its paths and its port moved."""
    moved = [w.replace("/model", str(image.root / "model")) for w in image.command]
    command = [w.replace("8000", str(port)) for w in image.entrypoint + moved]
    health = [w.replace("8000", str(port)) for w in image.health]
    environment = image.environment | {"OMP_NUM_THREADS": "1"}
    place = {"cwd": image.place("."), "env": environment}
    assert subprocess.run(health, **place, stderr=subprocess.DEVNULL).returncode != 0
    with subprocess.Popen(command, **place, stderr=subprocess.PIPE) as server:
        url = f"http://127.0.0.1:{port}"
        until(lambda: server.poll() is not None or status(f"{url}/ready") == 200)
        try:
            assert server.poll() is None, server.stderr.read().decode()
            assert subprocess.run(health, **place, check=False).returncode == 0
            found = post(url, recording(said(SENTENCES[0]))[1])
            assert found[2]["text"] == SENTENCES[0]
        finally:
            server.terminate()
        assert server.wait(30) == 0


def test_the_last_stage_wants_a_mounted_model():
    before, found = stages(runs.ROOT / "Dockerfile")
    assert before == [("ARG", "PYTHON=3.11-slim")]
    assert found["the last"] == ("server", [])
    assert ("CMD", '["--model", "/model"]') in found["server"][1]


def test_extras_are_what_is_installed_and_required_elsewhere():
    text = (runs.ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    pins = dict(re.findall(r'"([\w-]+)(==[\w.]+)"', extras))
    for name in ("fastapi", "starlette", "uvicorn", "websockets", "prometheus-client"):
        assert f"=={importlib.metadata.version(name)}" == pins[name]
    assert {"fastapi", "uvicorn", "websockets", "av", "sounddevice"} <= pins.keys()
    for path in runs.ROOT.glob("requirements*.txt"):
        for name, version in re.findall(r"^([\w-]+)(==[\w.]+)", path.read_text(), re.MULTILINE):
            assert pins.get(name, version) == version, (path, name)
