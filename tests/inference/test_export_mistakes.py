"""A file that computes something else is not kept, and a user's mistakes are told."""

import sys
from pathlib import Path

import pytest

import export as script
from inference.export import export, torchscript
from modules.errors import UserError
from tests.recipes.packages import hearing_package


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    true = torchscript.load

    def wrong(path):
        model = true(path)
        return lambda x, lengths: (model(x, lengths.clamp(max=60))[0], model(x, lengths)[1])

    monkeypatch.setattr(torchscript, "load", wrong)
    with pytest.raises(UserError, match="does not compute what the model does"):
        export(hearing_package(), "torchscript", tmp_path / "a.ts")
    assert not list(tmp_path.iterdir())


def call(monkeypatch, capsys, *arguments, status=0):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    if status:
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == status
    else:
        script.main()
    return capsys.readouterr()


def test_mistakes_are_told_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "there.ts").touch()
    (tmp_path / "folder.ts").mkdir()
    to = ["--to", "torchscript", "--output"]
    for message, *arguments in (
        ("there is no folder nowhere", "nowhere", *to, tmp_path / "a.ts"),
        ("files end in .ts", hearing_package(), *to, tmp_path / "a.onnx"),
        ("there is no folder", hearing_package(), *to, tmp_path / "none/a.ts"),
        ("exists; give --overwrite", hearing_package(), *to, tmp_path / "there.ts"),
        ("is a folder", hearing_package(), *to, tmp_path / "folder.ts", "--overwrite"),
        ("cannot stream", hearing_package(), *to, tmp_path / "a.ts", "--streaming"),
    ):
        shown = call(monkeypatch, capsys, "--model", *arguments, status=2)
        assert message in shown.err and not shown.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.ts", "there.ts"]
    out = [*to, tmp_path / "there.ts", "--overwrite"]
    shown = call(monkeypatch, capsys, "--model", hearing_package(), *out)
    assert "wrote" in shown.out and "100.00 %" in shown.out


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write to")
def test_a_place_that_cannot_be_written_to(monkeypatch, capsys):
    options = ["--model", hearing_package(), "--to", "torchscript", "--output", "/proc/a.ts"]
    shown = call(monkeypatch, capsys, *options, status=2)
    assert "error: /proc/" in shown.err and shown.err.endswith("; nothing is written\n")


@pytest.mark.parametrize(
    ("target", "package"),
    [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("coreml", "coremltools")],
)
def test_a_missing_package_names_the_extra(target, package, monkeypatch, capsys):
    monkeypatch.setattr(
        "inference.export.exporting.find_spec", lambda name: None if name == package else name
    )
    options = ["--model", hearing_package(), "--to", target]
    shown = call(monkeypatch, capsys, *options, status=2)
    assert package in shown.err and 'pip install ".[export]"' in shown.err


def test_help_teaches(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["export.py", "--help"])
        script.main()
    shown = capsys.readouterr().out
    for wanted in ("examples:", "--streaming", "torch.export.load", "exit status"):
        assert wanted in shown
