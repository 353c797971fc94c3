"""`python -m modules.environment`: one screen that says what a bug report needs."""

import subprocess
import sys
from pathlib import Path

import torch

from modules.environment import OPERATORS

ROOT = Path(__file__).parents[1]


def test_one_screen():
    done = subprocess.run(
        [sys.executable, "-m", "modules.environment"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 60
    words = {}
    for line in lines:
        words.setdefault(line.split()[0], line)  # the package torch comes before the backend
    assert torch.__version__.split("+")[0] in words["torch"]
    for name in ("python", "speechbrain", "cores", "memory", "cpu", "commit"):
        assert len(words[name].split()) > 1
    for operator in OPERATORS:
        assert operator.__name__.rpartition(".")[2] in words
        for backend, state in operator.available_backends().items():
            assert backend in words
            if state != "ok":
                assert len(state.split()) > 2  # why not
    assert "ok" in words["chunked"]


def test_no_operator_is_left_out():
    shown = {operator.__name__.rpartition(".")[2] for operator in OPERATORS}
    folders = (ROOT / "modules/ops").glob("*/__init__.py")
    assert shown == {f.parent.name for f in folders if "Backends(" in f.read_text()}
