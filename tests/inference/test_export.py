"""Exported files: judged by onnxruntime and PyTorch's own loaders, heard without PyTorch."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile as sf
import torch

import export as script
from benchmarks import exported as benchmark
from inference import Recognizer
from inference.export import export, onnx_file, parity
from inference.export.graphs import StepGraph, WholeGraph
from inference.files import model_of
from inference.onnx import OnnxRecognizer
from inference.parts import build_parts
from tests.recipes import runs
from tests.recipes.causal import causal_package, speech
from tests.recipes.packages import RATE, SENTENCES, hearing_package, said
from tests.test_docs import commands

MELS = runs.TINY["n_mels"]


# Each is run by a test: the first ones by the fixtures and tests that name their files.
EXPORTS = {
    "conmamba.onnx": "python export.py --model packages/conmamba --to onnx",
    "conmamba.pt2": "python export.py --model packages/conmamba --to torch-export",
    "conmamba.ts": "python export.py --model packages/conmamba --to torchscript",
    "conmamba.mlpackage": "python export.py --model packages/conmamba --to coreml",
    "conmamba-int8.onnx": "python export.py --model packages/conmamba --to onnx --int8",
    "causal-streaming.onnx": "python export.py --model packages/causal --to onnx --streaming",
}
HEAR = [
    "python transcribe.py speech.flac --model conmamba.onnx",
    "python transcribe.py speech.flac --model conmamba.onnx --format srt",
]
MEASURE = (
    "python benchmarks/exported.py packages/conmamba conmamba.onnx --data LibriSpeech/test-clean"
)
INSTALL = ["pip install .[export]", "pip install -r requirements-onnx.txt"]
ENTER = ["python3 -m venv small", ". small/bin/activate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the guide's commands are run."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "packages").mkdir()
    (folder / "packages/conmamba").symlink_to(hearing_package())
    (folder / "packages/causal").symlink_to(causal_package())
    sf.write(folder / "speech.flac", said(SENTENCES[0]), RATE)
    return folder


def exported(folder, name):
    """Run the guide's command for a file in this process, once."""
    if not (folder / name).exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", EXPORTS[name].split()[1:])
            script.main()
    return folder / name


@pytest.fixture(scope="module")
def whole(folder):
    """A bidirectional model that hears, as ONNX."""
    return exported(folder, "conmamba.onnx")


@pytest.fixture(scope="module")
def step(folder):
    """One step of a causal model that hears, as ONNX."""
    return exported(folder, "causal-streaming.onnx")


@pytest.fixture(scope="module")
def recognizer():
    return Recognizer.from_folder(hearing_package(), device="cpu")


def changed(folder, **parts):
    """A package of random weights, with other parts than the one that hears."""
    shutil.copytree(hearing_package(), folder)
    config = json.loads((folder / "config.json").read_text())
    for name, values in parts.items():
        config["parts"][name].update(values)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = model_of(build_parts(config["parts"])).state_dict()
    torch.save(weights, folder / "model.ckpt")
    return folder


def padded(lengths, seed=0):
    """Features (B, T, n_mels) whose padding is anything, and lengths."""
    x = 3 * torch.randn(
        len(lengths), max(lengths), MELS, generator=torch.Generator().manual_seed(seed)
    )
    lengths = torch.tensor(lengths)
    x[torch.arange(x.shape[1]) >= lengths[:, None]] = 1e4
    return x, lengths


# ---- ONNX ----


@torch.no_grad()
def test_onnxruntime_computes_the_model_whatever_the_padding(whole, recognizer):
    session = onnxruntime.InferenceSession(whole)
    graph = WholeGraph(recognizer).eval()
    for lengths in ([8], [130], [97, 8, 51], [64, 64]):
        x, counts = padded(lengths)
        y, frames = session.run(None, {"features": x.numpy(), "lengths": counts.numpy()})
        assert frames.tolist() == [-(-n // 4) for n in lengths]
        for i, n in enumerate(lengths):
            expected, _ = graph(x[i : i + 1, :n], counts[i : i + 1])
            np.testing.assert_allclose(y[i, : frames[i]], expected[0], atol=1e-4)


def test_the_scan_is_onnxs(whole, step):
    for path, scans in ((whole, 2), (step, 1)):  # one layer, two directions and one
        model = onnx.load(path)
        onnx.checker.check_model(model)
        assert str(runs.ROOT).encode() not in path.read_bytes()  # of the code that made it
        assert sum(node.op_type == "Scan" for node in model.graph.node) == scans
        free = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert free == ["batch", "time", ""]


def test_the_file_says_how_to_use_it(whole, step, recognizer):
    for path, streaming in ((whole, False), (step, True)):
        about = json.loads(
            onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["mamba_asr"]
        )
        assert about["streaming"] is streaming and about["sample_rate"] == RATE
        assert about["vocabulary"][3:5] == ["'", "A"] and about["vocabulary"][-1] == "\u2581"
        assert about["seconds_per_frame"] == pytest.approx(0.04)
        assert about["features"]["n_mels"] == MELS
        assert len(about["states"]) == (6 if streaming else 0)
        names = [i.name for i in onnxruntime.InferenceSession(path).get_inputs()]
        assert (
            names
            == about["inputs"]
            == ["features", "lengths", *(s["name"] for s in about["states"])]
        )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_transcripts_are_the_packages(whole, recognizer, batch_size):
    exported = OnnxRecognizer.from_file(whole)
    signals = [said(t, noise=n, seed=i) for i, t in enumerate(SENTENCES) for n in (0.003, 0.006)]
    signals.append(speech(30, gap=0.5)[0])  # in windows
    ours = exported.transcribe(signals, RATE, batch_size)
    theirs = recognizer.transcribe(signals, RATE, batch_size)
    assert ours == theirs
    for a, b in zip(ours, theirs, strict=True):
        for v, w in zip(a.words, b.words, strict=True):
            assert (v.text, v.start, v.end) == (
                w.text,
                pytest.approx(w.start),
                pytest.approx(w.end),
            )
            assert v.confidence == pytest.approx(w.confidence, abs=1e-3)


def test_steps_are_one_pass(step, monkeypatch):
    theirs = Recognizer.from_folder(causal_package(), device="cpu")
    x, texts = speech(5, gap=0.6)
    for frames in (4, 36, 320):
        monkeypatch.setattr("inference.onnx.recognizer.STEP", frames)
        exported = OnnxRecognizer.from_file(step)
        found = exported.transcribe([x, x[:20_000]], RATE, chunk_seconds=0)
        assert found == theirs.transcribe([x, x[:20_000]], RATE, chunk_seconds=0)
        assert found[0].text == " ".join(texts)


WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchaudio", "speechbrain", "scipy", "sentencepiece", "hyperpyyaml"):
    sys.modules[name] = None  # importing it fails
runpy.run_path("transcribe.py", run_name="__main__")
"""


def hear(python, *arguments):
    command = [python, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=runs.ROOT, check=False
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    x = said(SENTENCES[0])
    sf.write(folder / "a.wav", x, RATE)
    time = np.arange(int(len(x) / RATE * 44100)) / 44100
    other = np.interp(time, np.arange(len(x)) / RATE, x)
    sf.write(folder / "b.flac", np.stack([other, other], 1), 44100)
    return folder


def test_it_hears_without_pytorch(whole, step, recordings):
    for path in (whole, step):
        done = hear(sys.executable, recordings, "--model", path, "--format", "json")
        assert (done.returncode, done.stderr) == (0, "")
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [f["text"] for f in found] == SENTENCES[:1] * 2
    done = hear(sys.executable, recordings, "--model", recordings)
    assert done.returncode == 2 and "a package needs PyTorch, which is not" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", HEAR)
def test_the_guides_transcriptions(command, whole, folder):
    code = WITHOUT_TORCH.replace("transcribe.py", str(runs.ROOT / "transcribe.py"))
    words = [sys.executable, "-c", code, *command.split()[2:]]
    environment = runs.environment(PYTHONPATH=str(runs.ROOT))
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, cwd=folder, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert SENTENCES[0] in done.stdout and ("-->" in done.stdout) == ("srt" in command)


def test_the_guides_commands_are_those_that_tests_run():
    shown = [" ".join(words) for words in commands(runs.ROOT / "docs/export.md")]
    assert sorted(shown) == sorted([*EXPORTS.values(), *HEAR, MEASURE, *INSTALL, *ENTER])


def test_it_is_measured(whole, folder, monkeypatch, capsys):
    (folder / "LibriSpeech").mkdir()
    (folder / "LibriSpeech/test-clean").symlink_to(runs.corpus() / "test-a")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [*MEASURE.split()[1:], "--repeats", "1"])
    benchmark.main()
    package, file = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert package["wer"] == file["wer"] < 20 and file["texts_as_the_first"] == 4
    assert file["megabytes"] == pytest.approx(whole.stat().st_size / 1e6, abs=0.001)
    assert package["cpu_per_second"] > 0 and file["cpu_per_second"] > 0


@pytest.mark.slow
def test_it_hears_where_pytorch_is_not_installed(whole, recordings, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "small"], check=True)
    python = tmp_path / "small/bin/python"
    for line in INSTALL[::-1]:
        dry = ["--dry-run"] if "export" in line else ["-q"]
        command = [python, "-m", *line.split(), *dry]
        subprocess.run(command, check=True, cwd=runs.ROOT)
    absent = "import importlib.util; assert importlib.util.find_spec('torch') is None"
    subprocess.run([python, "-c", absent], check=True)
    command = [python, "transcribe.py", recordings, "--model", whole]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == SENTENCES[:1] * 2


def test_mistakes_with_a_file_are_told(whole, recordings, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(whole.read_bytes()[:1000])
    other = onnx.load(whole)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    for message, *arguments in (
        ("there is no file none.onnx", "--model", "none.onnx"),
        ("is damaged, or no ONNX model", "--model", tmp_path / "bad.onnx"),
        ("was not written by export.py", "--model", tmp_path / "other.onnx"),
        ("--device cuda: a file .onnx runs on the CPU", "--model", whole, "--device", "cuda"),
        ("--lm a.arpa: give the package", "--model", whole, "--lm", "a.arpa"),
        ("beam_size=0 must be at least 1", "--model", whole, "--beam", 0),
    ):
        done = hear(sys.executable, recordings / "a.wav", *arguments)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr


def test_int8_is_smaller_and_still_hears(whole, recognizer, tmp_path):
    small = onnx_file.quantized(onnx.load(whole))
    onnx.save(small, tmp_path / "int8.onnx")
    assert any(n.op_type.startswith(("MatMulInteger", "DynamicQuantize")) for n in small.graph.node)
    assert (tmp_path / "int8.onnx").stat().st_size < whole.stat().st_size
    graph = WholeGraph(recognizer).eval()
    found = parity.check(graph, graph, onnx_file.load(tmp_path / "int8.onnx"), MELS, int8=True)
    assert 1e-6 < found.moved < parity.LIMIT_INT8
    heard = OnnxRecognizer.from_file(tmp_path / "int8.onnx").transcribe(
        [said(t) for t in SENTENCES], RATE
    )
    assert [t.text for t in heard] == SENTENCES


@pytest.mark.slow
def test_int8_of_the_command_line(folder):
    exported(folder, "conmamba-int8.onnx")
    heard = OnnxRecognizer.from_file(folder / "conmamba-int8.onnx").transcribe(
        said("ABE BED"), RATE
    )
    assert heard.text == "ABE BED"


# ---- PyTorch's own ----


@pytest.mark.slow
@torch.no_grad()
def test_torch_export_loads_by_itself(folder, recognizer):
    path = exported(folder, "conmamba.pt2")
    extra = {"mamba_asr.json": ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["mamba_asr.json"])["sample_rate"] == RATE
    graph = WholeGraph(recognizer).eval()
    for lengths in ([9], [97, 8, 51]):
        x, counts = padded(lengths)
        y, frames = loaded(x, counts)
        for i, n in enumerate(lengths):
            expected, _ = graph(x[i : i + 1, :n], counts[i : i + 1])
            torch.testing.assert_close(y[i, : frames[i]], expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("int8", [False, True])
def test_torchscript_runs_in_a_process_without_this_project(int8, folder, recognizer):
    path = exported(folder, "conmamba.ts")
    if int8:
        path, _ = export(hearing_package(), "torchscript", folder / "int8.ts", int8=True)
    x, counts = padded([97, 8, 51])
    torch.save((x, counts), folder / "inputs.pt")
    code = (
        "import sys, torch; m = torch.jit.load(sys.argv[1]); x = torch.load(sys.argv[2]); "
        "torch.save(m(*x), sys.argv[3]); assert 'modules' not in sys.modules"
    )
    files = [path, folder / "inputs.pt", folder / "outputs.pt"]
    subprocess.run([sys.executable, "-c", code, *files], cwd=folder, check=True, timeout=120)
    y, frames = torch.load(folder / "outputs.pt")
    with torch.no_grad():
        expected, _ = WholeGraph(recognizer).eval()(x, counts)
    assert frames.tolist() == [25, 2, 13]
    if int8:
        assert 1e-6 < parity.compare(y, expected).moved < parity.LIMIT_INT8
    else:
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "parts",
    [
        {"encoder": {"mixer": {"factory": "modules.attention.RelPosAttention", "num_heads": 2}}},
        {"normalize": {"norm_type": "sentence"}},
        {"features": {"top_db": None}},
        {
            "encoder": {"mixer": {"factory": "modules.mamba2.BiMamba2", "d_state": 4}},
            "frontend": {"channels": [8, 8, 8], "separable": True},
        },
    ],
    ids=["conformer", "sentence", "top_db", "mamba2_8x"],
)
def test_other_models_are_exported_too(parts, tmp_path):
    package = changed(tmp_path / "package", **parts)
    _, found = export(package, "torchscript", tmp_path / "a.ts")
    assert found.largest < 1e-4


def test_steps_of_torchscript(tmp_path):
    path, found = export(causal_package(), "torchscript", tmp_path / "a.ts", streaming=True)
    assert found.largest < 1e-4
    recognizer = Recognizer.from_folder(causal_package(), device="cpu")
    states = StepGraph(recognizer).states(3)
    y, frames, *new = torch.jit.load(path)(*padded([8, 4, 0]), *states)
    assert y.shape[:2] == (3, 2) and frames.tolist() == [2, 1, 0]
    assert [s.shape for s in new] == [s.shape for s in states]


# ---- CoreML ----


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_coreml_converts(streaming, folder, tmp_path):
    ct = pytest.importorskip("coremltools")
    if streaming:
        path = tmp_path / "a.mlpackage"
        export(causal_package(), "coreml", path, streaming=True)
    else:
        path = exported(folder, "conmamba.mlpackage")
    model = ct.models.MLModel(str(path), skip_model_load=True)
    about = json.loads(model.user_defined_metadata["mamba_asr"])
    spec = model.get_spec().description
    assert [i.name for i in spec.input] == about["inputs"]
    assert [o.name for o in spec.output] == about["outputs"]
