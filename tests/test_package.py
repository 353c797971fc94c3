"""A packaged model gives the texts of the test stage, from anywhere, and damage has a name."""

import csv
import json
import shutil
import stat
import subprocess
import sys

import pytest
import soundfile as sf
import torch
from hyperpyyaml import resolve_references
from speechbrain.inference.ASR import EncoderDecoderASR
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM

import package as script
from inference import Recognizer, Transcript
from inference.package import package
from inference.resolved import Resolved, configuration
from inference.snapshot import needed_files
from modules.errors import UserError
from tests.recipes import runs
from tests.recipes.packages import RECIPES, hypotheses, trained

YAML_FILES = [p for r in runs.SCRIPTS for p in sorted(runs.ROOT.glob(f"hparams/{r}/*.yaml"))]
TESTS = ("test-a", "test-b")


@pytest.fixture(scope="module")
def ctc():
    """(training's output folder, package)."""
    return trained("ctc")


@pytest.fixture(scope="module")
def s2s():
    return trained("s2s")


@pytest.fixture(params=RECIPES)
def both(request):
    return request.getfixturevalue(request.param)


def recordings(run):
    """{utterance: path} of the test sets."""
    paths = {}
    for name in TESTS:
        with open(run / f"{name}.csv") as f:
            paths |= {row["ID"]: row["wav"] for row in csv.DictReader(f)}
    return {k: v.replace("$data_root", str(runs.corpus())) for k, v in paths.items()}


def make_read_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def run_elsewhere(code, arguments, cwd, path):
    """Run Python code in a fresh process without a network: what it printed, as JSON."""
    offline = "import socket\nsocket.socket.connect = None\n"
    done = subprocess.run(
        [sys.executable, "-c", offline + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        # A folder's modes do not keep root from leaving bytecode there.
        env=runs.environment(PYTHONPATH=str(path), PYTHONDONTWRITEBYTECODE="1"),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- The same text ----

LOAD = """
import json, sys
from inference import Recognizer
texts = {}
for folder in sys.argv[2:]:
    recognizer = Recognizer.from_folder(folder, device="cpu")
    found = recognizer.transcribe(json.loads(sys.argv[1]))
    texts[folder] = [t.text for t in found]
print(json.dumps(texts))
"""

FOREIGN = """
import json, sys
from speechbrain.inference.interfaces import foreign_class
texts = {}
for folder in sys.argv[2:]:
    model = foreign_class(source=folder, pymodule_file="interface.py", classname="Interface",
                          run_opts={"device": "cpu"})
    texts[folder] = [model.transcribe_file(path) for path in json.loads(sys.argv[1])]
import inference, modules
texts["code"] = [inference.__file__, modules.__file__]
print(json.dumps(texts))
"""

HPARAMS = """
import json, sys
import torch
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
texts = {}
for folder in sys.argv[2:]:
    kind = EncoderDecoderASR if "s2s" in folder.rpartition("/")[2] else EncoderASR
    model = kind.from_hparams(source=folder, run_opts={"device": "cpu"})
    wavs = [model.load_audio(path) for path in json.loads(sys.argv[1])]
    lengths = torch.tensor([len(x) for x in wavs])
    wavs = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    texts[folder], _ = model.transcribe_batch(wavs, lengths / wavs.shape[1])
    alone = [model.transcribe_file(path) for path in json.loads(sys.argv[1])]
    assert alone == texts[folder]
print(json.dumps(texts))
"""


@pytest.mark.parametrize(
    ("code", "path"),
    [(LOAD, runs.ROOT), (FOREIGN, ""), (HPARAMS, runs.ROOT)],
    ids=["Recognizer", "foreign_class", "from_hparams"],
)
def test_texts_are_the_test_stages_elsewhere(code, path, ctc, s2s, tmp_path):
    both = {"ctc": ctc, "s2s": s2s}
    folders = {shutil.copytree(p, tmp_path / name): r for name, (r, p) in both.items()}
    for folder in folders:
        make_read_only(folder)
    before = [runs.files_of(folder) for folder in folders]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    paths = recordings(ctc[0])
    found = run_elsewhere(code, [json.dumps(list(paths.values())), *folders], elsewhere, path)
    for folder, run in folders.items():
        texts = dict(zip(paths, found[str(folder)], strict=True))
        assert texts == hypotheses(run)
        assert len(set(texts.values())) > 1  # not one text for whatever is said
    for file in found.get("code", []):
        assert file.startswith(str(tmp_path))  # the package's own
    assert before == [runs.files_of(folder) for folder in folders]
    assert not list(elsewhere.iterdir())


def test_an_utterance_alone_as_in_a_batch(both):
    run, folder = both
    recognizer = Recognizer.from_folder(folder, device="cpu")
    for name, path in recordings(run).items():
        (samples, rate), expected = sf.read(path, dtype="float32"), hypotheses(run)[name]
        transcript = recognizer.transcribe(path)
        assert transcript == Transcript(expected, len(samples) / rate)
        assert recognizer.transcribe(samples, sample_rate=rate) == transcript
    assert [
        t.text for t in recognizer.transcribe(list(recordings(run).values()), batch_size=3)
    ] == (list(hypotheses(run)[name] for name in recordings(run)))
    assert recognizer.transcribe([]) == []


def test_the_language_model_goes_along(s2s, tmp_path):
    run, _ = s2s
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "d_ffn": 16}
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(run / "save/tokenizer.model", source / "tokenizer.ckpt")
    torch.manual_seed(0)
    lm = TransformerLM(vocab=10, num_decoder_layers=0, dropout=0.0, normalize_before=False, **sizes)
    torch.save(lm.state_dict(), source / "lm.ckpt")
    options = {"no_lm": False, "lm_weight": 3.0, "make_lm": str(sizes)}
    runs.train(
        RECIPES["s2s"],
        tmp_path / "run",
        resume=run,
        skip_train=True,
        pretrained_lm_tokenizer_path=source,
        **options,
    )
    folder = package(tmp_path / "run", tmp_path / "lm")
    assert "| language model | TransformerLM: weight 3.0 |" in (folder / "README.md").read_text()
    recognizer = Recognizer.from_folder(folder, device="cpu")
    paths, expected = recordings(run), hypotheses(tmp_path / "run")
    assert expected != hypotheses(run)
    found = recognizer.transcribe(list(paths.values()))
    assert dict(zip(paths, [t.text for t in found], strict=True)) == expected
    foreign = EncoderDecoderASR.from_hparams(source=folder, run_opts={"device": "cpu"})
    assert {name: foreign.transcribe_file(path) for name, path in paths.items()} == expected
    without = package(tmp_path / "run", tmp_path / "without", use_lm=False)
    assert "| language model | none |" in (without / "README.md").read_text()
    found = Recognizer.from_folder(without, device="cpu").transcribe(list(paths.values()))
    assert dict(zip(paths, [t.text for t in found], strict=True)) == hypotheses(run)


# ---- Packaging ----


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["package.py", *map(str, arguments)])
    with runs.own_logging():
        script.main()


def test_the_command_line(ctc, tmp_path, monkeypatch, capsys):
    run, _ = ctc
    target = tmp_path / "new" / "package"
    call(monkeypatch, run, "--output", target)
    assert f"wrote {target}" in capsys.readouterr().out
    card = (target / "README.md").read_text()
    wer = (run / "wer_test-a.txt").read_text().split()[1]
    for wanted in ("CTC/conmamba_tiny", "BiMamba", "| test-a |", f" {wer} |", "MIT", "commit"):
        assert wanted in card
    assert [p.name for p in target.parent.iterdir()] == ["package"]
    # Again: only when asked, and then wholly.
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, run, "--output", target)
    assert "give --overwrite" in capsys.readouterr().err
    (target / "model.onnx").touch()
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, run, "--output", target, "--overwrite")
    assert "holds model.onnx, which no package has" in capsys.readouterr().err
    (target / "model.onnx").unlink()
    (target / "lm.ckpt").touch()  # of a package of an S2S model
    call(monkeypatch, run, "--output", target, "--overwrite")
    assert not (target / "lm.ckpt").exists()
    assert [p.name for p in target.parent.iterdir()] == ["package"]
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, "--help")
    assert "Recognizer.from_folder" in capsys.readouterr().out


def test_nothing_is_written_when_packaging_fails(ctc, s2s, tmp_path):
    run, _ = ctc
    target = tmp_path / "package"
    with pytest.raises(UserError, match="there is no folder"):
        package(tmp_path / "nowhere", target)
    with pytest.raises(UserError, match=r"holds no hyperparams.yaml"):
        package(run / "save", target)
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    shutil.copyfile(run / "hyperparams.yaml", untrained / "hyperparams.yaml")
    (untrained / "save").mkdir()
    with pytest.raises(UserError, match="there is no checkpoint"):
        package(untrained, target)
    moved = shutil.copytree(s2s[0], tmp_path / "moved")
    (moved / "save/tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer.model is missing"):
        package(moved, target)
    with pytest.raises(UserError, match="is no package, so it is not overwritten"):
        package(run, moved, overwrite=True)
    # Many an application has a config.json.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"name": "my-app"}')
    with pytest.raises(UserError, match="is no package, so it is not overwritten"):
        package(run, other, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved", "other", "untrained"]


def test_a_foreign_class_in_the_recipe_is_refused(ctc, tmp_path):
    run = shutil.copytree(ctc[0], tmp_path / "run")
    text = (run / "hyperparams.yaml").read_text()
    (run / "hyperparams.yaml").write_text(text.replace("modules.mamba.BiMamba", "my.Mixer"))
    with pytest.raises(UserError, match=r"encoder is made by my.Mixer.*inference/parts.py"):
        package(run, tmp_path / "package")


def test_packaging_leaves_the_run_alone(both, tmp_path):
    run, _ = both
    before = runs.files_of(run)
    package(run, tmp_path / "package")
    assert runs.files_of(run) == before


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: p.stem)
def test_every_shipped_file_has_a_configuration(path, tmp_path):
    units = {}
    if path.parent.name == "CTC" and "SubwordTokenizer" in path.read_text():  # learnt labels
        (tmp_path / "save").mkdir()
        shutil.copy(trained("s2s")[0] / "save/tokenizer.model", tmp_path / "save")
        units = {"output_neurons": 10}
    with open(path) as f:
        (tmp_path / "resolved.yaml").write_text(resolve_references(f, units).read())
    config = configuration(Resolved(tmp_path / "resolved.yaml"))
    assert config == json.loads(json.dumps(config))


def test_the_snapshot_holds_what_is_imported_and_no_training_code():
    files = {str(p) for p in needed_files()}
    assert {"inference/recognizer.py", "modules/ops/selective_scan/chunked.py"} <= files
    assert not {"modules/brain.py", "modules/data.py", "inference/package.py"} & files
