"""docs/inference.md, streaming.md and export.md: every command and program in them is run.

In a folder as the reader has it, with tiny models. docs/deployment.md: server/test_deployment.py.
"""

import io
import re
import runpy
import shlex
import sys
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import stream
from tests.recipes import runs
from tests.recipes.causal import causal_package
from tests.recipes.packages import RATE, SENTENCES, hearing_package, said
from tests.test_docs import FENCE

# What is not run here, as its beginning, and why. tests/test_docs.py reads their options.
NOT_RUN = {
    "pip install": "needs the network",
    "python3 -m venv small": "needs the network; inference/test_export.py runs without PyTorch",
    "python train_CTC.py": "trains for hours; test_train.py runs the script",
    "python -m demo.make_corpus": "minutes; test_demo_corpus.py runs it",
    "python -m tests.recipes.agreement": "a minute; test_agreement.py runs it",
    "python benchmarks/streaming.py": "minutes; test_stream.py runs it",
    "python stream.py --microphone": "needs a microphone; test_stream.py has one that is played",
}
SLOW = ("--to coreml", "--to torchscript", "--to torch-export", "--int8", "benchmarks/exported.py")
TEXT = SENTENCES[0]


def steps(page):
    """Command lines and programs in the order of a page: [(language, text)]."""
    found = []
    for language, block in FENCE.findall((runs.ROOT / f"docs/{page}.md").read_text()):
        if language == "python":
            found.append((language, block))
        elif language == "bash":
            lines = block.replace("\\\n", " ").splitlines()
            found += [(language, line) for line in lines if line.strip()]
    return found


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The reader's folder, with recordings and the output folders of two trainings."""
    for name, package in (("large", hearing_package()), ("causal_small", causal_package())):
        folder = tmp_path / f"results/CTC/conmamba_{name}"
        folder.mkdir(parents=True)
        (folder / "3402").symlink_to(package.parent / "run")
    for folder in ("talks", "calls", "packages", "LibriSpeech"):
        (tmp_path / folder).mkdir()
    (tmp_path / "LibriSpeech/test-clean").symlink_to(runs.corpus() / "test-a")
    for name in ("speech.flac", "talks/a.wav", "calls/b.mp3", "a.wav", "b.mp3"):
        sf.write(tmp_path / name, said(TEXT), RATE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, monkeypatch, capsys):
    """A command of this project, in this process: what it wrote to stdout."""
    # What a recorder would send comes from the file.
    *recorder, command = line.split(" | ")
    if recorder:
        pcm = (said(TEXT) * 32767).astype("<i2").tobytes()
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(pcm)))
    python, script, *arguments = shlex.split(command, comments=True)
    assert python == "python" and (runs.ROOT / script).is_file(), line
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(runs.ROOT / script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, capsys.readouterr().err
    return capsys.readouterr().out


def go_through(page, chosen, reader, monkeypatch, capsys):
    """Run a page's commands that are chosen; returns how many there were."""
    count = 0
    for language, text in steps(page):
        if language == "python" or text.startswith(tuple(NOT_RUN)) or not chosen(text):
            continue
        out, count = run(text, monkeypatch, capsys), count + 1
        if "transcribe.py" in text and "--output-dir" not in text:
            assert TEXT in out.replace("\n", " ") or "-->" in out, text
        elif "stream.py" in text:
            assert TEXT in out, text
    return count


def quick(line):
    return not any(word in line for word in SLOW)


def program(page, number, **names):
    """Run a page's program with these names: its own names."""
    code = [text for language, text in steps(page) if language == "python"][number]
    exec(compile(code, f"docs/{page}.md", "exec"), names)
    return names


def test_inference(reader, monkeypatch, capsys):
    assert go_through("inference", quick, reader, monkeypatch, capsys) == 5
    assert TEXT in (reader / "subtitles/a.srt").read_text()
    samples, paths = np.zeros(44100, np.float32), ["a.wav", "none.wav"]
    program("inference", 0, samples=samples, paths=paths)
    out = capsys.readouterr().out
    assert out.count(TEXT) == 2 and "there is no file none.wav" in out
    wavs = torch.from_numpy(said(TEXT))[None]
    program("inference", 1, wavs=wavs, wav_lens=torch.ones(1))
    assert capsys.readouterr().out.count(TEXT) == 2
    program("inference", 2)
    assert TEXT in capsys.readouterr().out


def test_streaming(reader, monkeypatch, capsys):
    assert go_through("streaming", quick, reader, monkeypatch, capsys) == 4
    packets = np.array_split(said(TEXT), 30)
    assert program("streaming", 0, packets=packets)["transcript"].text == TEXT


@pytest.mark.slow
def test_export(reader, monkeypatch, capsys):
    (reader / "packages/conmamba").symlink_to(hearing_package())
    (reader / "packages/causal").symlink_to(causal_package())
    assert go_through("export", quick, reader, monkeypatch, capsys) == 4
    about = program(
        "export",
        0,
        features=np.zeros((1, 100, 16), np.float32),
        lengths=np.array([100]),
    )
    assert about["log_probs"].shape[:2] == (1, 25) and about["frames"] == [25]
    step = program(
        "export",
        1,
        features=np.zeros((1, 99, 16), np.float32),
        lengths=np.array([99]),
    )
    assert step["start"] == 96 and step["log_probs"].shape[:2] == (1, 1) and step["frames"] == [1]


@pytest.mark.slow
def test_the_other_exports(reader, monkeypatch, capsys):
    (reader / "packages/conmamba").symlink_to(hearing_package())
    wanted = [t for _, t in steps("export") if not quick(t) and not t.startswith(tuple(NOT_RUN))]
    run("python export.py --model packages/conmamba --to onnx", monkeypatch, capsys)
    assert go_through("export", lambda t: not quick(t), reader, monkeypatch, capsys) == len(wanted)


def test_what_is_not_run_is_there_and_is_read():
    lines = [text for page in ("inference", "streaming", "export") for _, text in steps(page)]
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in lines), beginning
    for line in lines:
        if line.startswith("python stream.py"):
            words = shlex.split(re.sub(r"^.* \| ", "", line), comments=True)
            assert stream.parser().parse_args(words[2:]).model
