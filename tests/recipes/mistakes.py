"""Command lines that end in an error, for the tests of what it says."""

import sys

import pytest

from modules import launch
from tests.recipes import runs

EXAMPLE = "hparams/CTC/conmamba_tiny.yaml"


def call(capfd, monkeypatch, recipe, argv):
    """Run a script's command line here: (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, argv)])
    with runs.own_logging(), pytest.raises(SystemExit) as end:
        launch.run(runs.SCRIPTS[recipe].main, f"train_{recipe}.py", EXAMPLE)
    out, err = capfd.readouterr()
    return end.value.code, out, err


def told(capfd, monkeypatch, output_folder, yaml_file, *words, folder=None, **overrides):
    """Call with a mistake; returns the one line that tells it."""
    argv = runs.arguments(yaml_file, folder or output_folder, **overrides)
    status, out, err = call(capfd, monkeypatch, runs.recipe_of(yaml_file), [*argv, *words])
    assert status == 2
    assert "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")
