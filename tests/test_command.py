"""A command's end: a line for a person, and a status for a script."""

import argparse
import os
import subprocess
import sys
from collections import Counter

import pytest

from modules.command import count, number, plain_errors, threads
from modules.errors import UserError
from modules.options import Wiring, load, read_options, top_level
from modules.resolved import plain_values
from tests.recipes import runs

COUNTER = "normalize: !new:collections.Counter\n    x: 1\n"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("n=0 must be positive"), 2, "error: n=0 must be positive\n"),
        (OSError("no space"), 2, "error: no space; nothing was written\n"),
        (OSError(28, "no space", "a/b"), 2, "error: a/b: no space; nothing was written\n"),
        (OSError(28, "no space"), 2, "error: no space; nothing was written\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
    ],
)
def test_one_line_and_a_status(capsys, error, status, told):
    with pytest.raises(SystemExit) as end, plain_errors("stopped", "nothing was written"):
        raise error
    assert end.value.code == status
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=count)
    assert parser.parse_args(["--workers", "12"]).workers == 12
    with pytest.raises(SystemExit):
        parser.parse_args([f"--workers={text}"])
    assert f"{text!r} must be a whole number, 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "wrong", "expected"),
    [
        (number, "nan", "must be a number, such as 0.5"),
        (number, "1e999", "must be a number, such as 0.5"),
        (number, "two", "must be a number, such as 0.5"),
        (threads, "0", "must be a whole number, 1 or more"),
        (threads, "1025", "must be 1 to 1024"),
    ],
)
def test_numbers_and_threads(kind, wrong, expected):
    assert kind("16") == 16
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        kind(wrong)


def test_our_own_mistakes_keep_their_trace():
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("d_model")


def test_a_reader_that_has_enough():
    """As head: nothing is said, and nothing when Python flushes at its end."""
    code = (
        "from modules.command import plain_errors\n"
        "with plain_errors():\n"
        "    for i in range(100_000):\n"
        "        print(i)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=runs.ROOT
    )
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert process.communicate() == (None, b"")
    assert process.returncode == 1


def test_mappings_are_replaced_and_arguments_changed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train_mix: {a: 2, b: 1}\nlike: !ref <train_mix>\n" + COUNTER)
    defaults = top_level(path)
    assert defaults["train_mix"] == {"a": 2, "b": 1} and isinstance(defaults["normalize"], Wiring)

    def given(key, text):
        _, overrides = read_options([str(path), f"--{key}", text], defaults)
        return top_level(path, overrides)[key]

    assert given("train_mix", "null") is None
    assert given("train_mix", "{a: 3}") == {"a": 3}
    assert given("train_mix", "{}") == {}
    _, overrides = read_options([str(path), "--train_mix={a: 3}", "--normalize={z: 5}"], defaults)
    hparams = load(path, overrides)
    assert hparams["train_mix"] == hparams["like"] == {"a": 3}
    assert hparams["normalize"] == Counter({"x": 1, "z": 5})
    with pytest.raises(UserError, match=r"must be a mapping, such as .* takes the place of the fi"):
        given("train_mix", "3")
    with pytest.raises(UserError, match="normalize makes an object; give its arguments as"):
        given("normalize", "null")


def test_exponents_in_a_file_are_numbers(tmp_path):
    """As to HyperPyYAML, for what the command line puts in their place and what is packaged."""
    path = tmp_path / "a.yaml"
    path.write_text("rate: 3e-3\ntext: '3e-3'\nlist: [1E5, .5e+1, -2.e0, e1, 1e]\n")
    defaults = top_level(path)
    assert defaults == load(path, {})
    assert defaults == {"rate": 0.003, "text": "3e-3", "list": [1e5, 5.0, -2.0, "e1", "1e"]}
    _, overrides = read_options([str(path), "--rate", "1e-3", "--text", "1e-3"], defaults)
    assert overrides == {"rate": 0.001, "text": "1e-3"}
    assert plain_values(path, "rate", "text", "more") == [0.003, "3e-3", None]
