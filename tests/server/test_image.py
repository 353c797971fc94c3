"""The Dockerfile: its steps run in a scratch folder, and what they make serves."""

import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.recipes import runs
from tests.recipes.causal import causal_package
from tests.server.images import Image, stages
from tests.server.servers import free_port, post, status, until
from tests.server.test_transcriptions import recording
from tests.test_transcribe import SENTENCES, said


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
    """A folder of programs: a Python that has this one's packages unless it is `alone`; useradd."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if not alone:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    added = folder / "bin" / "useradd"
    added.write_text(f'#!/bin/sh\necho "$@" > {folder}/users\n')
    added.chmod(0o755)
    return f"{folder}/bin:/usr/local/bin:/usr/bin:/bin"


@pytest.mark.parametrize(
    "alone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "downloaded"]
)
def test_a_baked_image_serves(context, tmp_path, alone):
    """Quick: pip finds the pinned versions installed already, and would fail on others."""
    path = programs(tmp_path / "python", alone)
    options = {"TORCH_INDEX": "", "MODEL": "packages/tiny"}
    if not alone:
        path = offline(path, tmp_path)
    image = Image(context, tmp_path / "root", path, "baked", **options)
    assert image.base == "server" and image.stages["server"][0] == "python:${PYTHON}"
    assert "--uid 10001" in (tmp_path / "python" / "users").read_text()
    assert image.user == "10001"  # no root
    kept = {p.name for p in (tmp_path / "root" / "app").iterdir()}
    made = {"build", "mamba_asr.egg-info"}  # by pip
    copied = {"LICENSE", "pyproject.toml", "requirements.txt", "serve.py", "transcribe.py"}
    assert kept - made == copied | {"modules", "inference"}
    assert not list((tmp_path / "root").rglob("__pycache__"))
    serves(image, free_port())


def offline(path, tmp_path):
    """pip that takes what is installed, and may not look elsewhere."""
    python = tmp_path / "quick" / "python"
    python.parent.mkdir()
    whole = f"{path.partition(':')[0]}/python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in "-m pip install "*) shift 3\n'
        f'  exec {whole} -m pip install --no-index --no-build-isolation "$@" ;;\n'
        f'esac\nexec {whole} "$@"\n'
    )
    python.chmod(0o755)
    return f"{python.parent}:{path}"


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


def test_extras_and_requirements_have_the_same_pins():
    text = (runs.ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    pins = dict(re.findall(r'"([\w-]+)(==[\w.]+)"', extras))
    assert {"fastapi", "uvicorn", "websockets", "av", "sounddevice"} <= pins.keys()
    for path in runs.ROOT.glob("requirements*.txt"):
        for name, version in re.findall(r"^([\w-]+)(==[\w.]+)", path.read_text(), re.MULTILINE):
            assert pins.get(name, version) == version, (path, name)
