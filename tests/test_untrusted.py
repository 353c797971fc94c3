"""Packages, checkpoints and recipes from strangers: what they would run is not run."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer as PlainCheckpointer

import package as package_script
import tune
from inference import Recognizer
from inference.package import package
from inference.resolved import Resolved, configuration
from modules.checkpoints import Checkpointer
from modules.convert import convert_folder
from modules.digests import SUMS, seal
from modules.errors import UserError
from modules.language_model import load_language_model
from modules.options import top_level
from modules.resolved import plain_values
from modules.tensors import load_tensors
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"


class Evil:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def mark(tmp_path):
    """A file that malicious content would make; afterwards it must not be there."""
    path = tmp_path / "evil"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    runs.train(CTC, folder / "run", number_of_epochs=1)
    package(folder / "run", folder / "package")
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path):
    """(output folder, package) that can be changed."""
    shutil.copytree(run.parent, tmp_path / "copy")
    return tmp_path / "copy/run", tmp_path / "copy/package"


# ---- Pickles ----


def pickled(mark):
    """Files of all the kinds that torch.load takes, each of which would make a file."""
    command = f"touch {mark}"
    evil = Evil(os.system, command)
    return {
        "zip": lambda path: torch.save({"weight": evil}, path),
        "legacy": lambda path: torch.save(
            {"weight": evil}, path, _use_new_zipfile_serialization=False
        ),
        "pickle": lambda path: path.write_bytes(pickle.dumps(evil, protocol=2)),
        "protocol 5": lambda path: path.write_bytes(pickle.dumps(evil, protocol=5)),
        "eval": lambda path: torch.save([Evil(eval, f"open({str(mark)!r}, 'w')")], path),
        "open": lambda path: torch.save([Evil(open, str(mark), "w")], path),
        "Popen": lambda path: torch.save([Evil(subprocess.Popen, ["touch", str(mark)])], path),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", pickled(""))
def test_a_pickle_that_would_run_code(kind, mark, tmp_path):
    pickled(mark)[kind](tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a.ckpt (holds|is damaged)") as error:
        load_tensors(tmp_path / "a.ckpt")
    assert "weights_only" not in str(error.value)  # no advice to read it all the same
    if kind in ("zip", "legacy"):
        assert "posix.system, which is no tensor" in str(error.value)


def test_the_pickle_is_a_real_one(tmp_path):
    """What the other tests refuse does make the file when it is read as Python does."""
    pickled(tmp_path / "evil")["zip"](tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["model", "normalizer"])
def test_in_a_package(name, copied, mark):
    pickled(mark)["zip"](copied[1] / f"{name}.ckpt")
    with pytest.raises(UserError, match=rf"{name}.ckpt holds posix.system"):
        Recognizer.from_folder(copied[1], device="cpu")


def spoil(run, name, mark):
    """Put a pickle into a run's checkpoint, digests and all."""
    found = Checkpointer(run / "save").find_checkpoint()
    pickled(mark)["zip"](found.paramfiles[name])
    (found.path / SUMS).unlink()
    seal(found.path)
    return found.path


@pytest.mark.parametrize("name", ["model", "normalizer", "optimizer"])
def test_in_a_checkpoint_to_resume_from(name, copied, mark, tmp_path):
    """Digests do not help: the stranger wrote them too."""
    spoil(copied[0], name, mark)
    options = {"resume": copied[0], "number_of_epochs": 2}
    with pytest.raises(UserError, match=r"(model.ckpt|CKPT\+[-+\w]+) holds posix.system"):
        runs.train(CTC, tmp_path / "more", **options)


def test_in_a_checkpoint_to_evaluate_package_or_convert(copied, mark, tmp_path):
    checkpoint = spoil(copied[0], "model", mark)
    with pytest.raises(UserError, match=r"model.ckpt holds posix.system"):
        runs.train(CTC, copied[0], skip_train=True)
    with pytest.raises(UserError, match=r"model.ckpt holds posix.system"):
        package(copied[0], tmp_path / "package")
    with pytest.raises(UserError, match=r"model.ckpt holds posix.system"):
        convert_folder(checkpoint, runs.ROOT / "hparams" / CTC, tmp_path / "out")


def test_in_a_language_model(mark, tmp_path):
    pickled(mark)["zip"](tmp_path / "lm.ckpt")
    with pytest.raises(UserError, match=r"lm.ckpt holds posix.system"):
        load_language_model(lambda: torch.nn.Linear(1, 1), tmp_path)


def test_pytorch_told_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set"):
        runs.build(CTC, tmp_path)


def test_speechbrains_own_reading_is_of_weights_alone(mark, tmp_path):
    """What this project builds on: optimizer, schedule and statistics are read by SpeechBrain."""
    layer = torch.nn.Linear(1, 1)
    checkpointer = PlainCheckpointer(tmp_path / "save", {"layer": layer})
    checkpoint = checkpointer.save_checkpoint()
    pickled(mark)["zip"](checkpoint.paramfiles["layer"])
    with pytest.raises(pickle.UnpicklingError):
        checkpointer.recover_if_possible()


# ---- YAML ----


def bombs(mark):
    """{name: (YAML of one value, what the error says)}"""
    aliases = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    aliases += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return {
        "new": (f"!new:os.system [touch {mark}]", "made by os.system"),
        "new by name": (f"!new:subprocess.Popen {{args: [touch, {mark}]}}", "made by subprocess"),
        "apply": (f"!apply:os.system [touch {mark}]", "holds !apply:os.system"),
        "applyref": (f"!applyref:os.system [touch {mark}]", "holds !applyref:os.system"),
        "name": ("!name:os.system", "made by os.system"),
        "name of ours": ("!name:modules.launch.run", "made by modules.launch.run"),
        "module": ("!module:antigravity", "holds !module:antigravity"),
        "include": ("!include:/etc/passwd", "holds !include:/etc/passwd"),
        "include above": ("!include:../../secrets.yaml {a: 1}", "holds !include:../../secrets"),
        "ref": ("!ref <encoder>", "holds !ref"),
        "copy": ("!copy <encoder>", "holds !copy"),
        "tuple": (f"!tuple (!!python/object/apply:os.system [touch {mark}])", "holds !tuple"),
        "python name": ("!!python/name:os.system ''", "python/name:os.system"),
        "python module": ("!!python/module:os ''", "python/module:os"),
        "python apply": (f"!!python/object/apply:os.system [touch {mark}]", "python/object/apply"),
        "python new": (
            f"!!python/object/new:os.system {{args: [touch {mark}]}}",
            "python/object/new",
        ),
        "python object": ("!!python/object:builtins.open {name: a}", "python/object"),
        "aliases": (f"[{', '.join(aliases)}]", "holds over 10000 values"),
        "itself": ("&a [*a]", "holds over 10000 values|nested too deeply"),
        "deep": ("[" * 700 + "]" * 700, "nested too deeply|not a YAML file"),
        "very deep": ("[" * 20_000 + "]" * 20_000, "nested too deeply|not a YAML file"),
        "many": (f"[{'1, ' * 12_000}]", "holds over 10000 values"),
        "large": ("x" * (1 << 20), "training writes less"),
        "complex keys": ("{? [a, b] : 1}", "no plain value"),
        "a wrong number": ("!!int x", "no plain value"),
    }


@pytest.mark.parametrize("name", bombs(""))
def test_yaml_that_would_run_code_or_fill_memory(name, copied, mark, tmp_path, capsys, monkeypatch):
    """In a stranger's output folder that is to be packaged: all of its values are plain data."""
    path = copied[0] / "hyperparams.yaml"
    value, message = bombs(mark)[name]
    lines = path.read_text().splitlines()
    lines = [line for line in lines if not line.startswith("sample_rate:")]
    path.write_text("\n".join([*lines, f"sample_rate: {value}"]) + "\n")
    with pytest.raises(UserError, match=message):
        configuration(Resolved(path))
    argv = ["package.py", str(copied[0]), "--output", str(tmp_path / "package")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        package_script.main()
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("place", ["output_folder", "resume"])
def test_an_evaluation_runs_nothing_that_hyperparams_name(place, copied, mark, tmp_path):
    """It asks the run's hyperparams.yaml, or that of the one to resume, what was learnt from."""
    path, folder = copied[0] / "hyperparams.yaml", copied[0]
    call = f"!applyref:os.system [touch {mark}]"
    path.write_text(f"{path.read_text()}\nx: {call}\n")
    options = {"skip_train": True}
    if place == "resume":
        folder, options["resume"] = tmp_path / "new", folder
    assert "WER" in runs.train(CTC, folder, **options)
    path.write_text(path.read_text().replace("train_shards:", f"train_shards: {call}", 1))
    with pytest.raises(UserError, match=r"train_shards holds !applyref:os.system"):
        runs.train(CTC, folder, **options)


def test_a_part_of_the_model_may_not_be_another_class(copied, mark):
    path = copied[0] / "hyperparams.yaml"
    text = path.read_text()
    for ours in ("modules.mamba.BiMamba", "modules.encoder.Encoder", "torch.nn.Linear"):
        path.write_text(text.replace(ours, "os.system"))
        with pytest.raises(UserError, match=r"made by os.system, which a package cannot hold"):
            configuration(Resolved(path))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"new": "os.system", "command": "true"}, "'os.system' is not a class"),
        ({"factory": "builtins.eval"}, "'builtins.eval' is not a class"),
        ({"new": ["os.system"]}, "cannot be made"),
        ({"part": "encoder"}, "is used before it is made"),
        ({"new": "torch.nn.Linear", "in_features": 10**12, "out_features": 1}, "is larger than"),
        ({"new": "torch.nn.Linear", "in_features": 1 << 20, "out_features": 1 << 20}, "be made"),
        ({"new": "torch.nn.Linear", "in_features": "a", "out_features": []}, "cannot be made"),
    ],
)
def test_a_packages_configuration(part, message, copied):
    path = copied[1] / "config.json"
    config = json.loads(path.read_text())
    config["parts"] = {"features": part} | config["parts"]
    config["parts"]["features"] = part
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        Recognizer.from_folder(copied[1], device="cpu")


def test_yaml_is_too_deep_whatever_depth_python_recurses_to(tmp_path):
    """Inductor raises Python's limit, once it has compiled anything."""
    limit, path = sys.getrecursionlimit(), tmp_path / "hyperparams.yaml"
    path.write_text("sample_rate: " + "[" * 700 + "]" * 700)
    try:
        for other in (limit, 5000):
            sys.setrecursionlimit(other)
            with pytest.raises(UserError, match=r"nested too deeply|not a YAML file"):
                plain_values(path, "sample_rate")
    finally:
        sys.setrecursionlimit(limit)


def test_a_packages_configuration_that_is_deep(copied):
    for text in (
        "[" * 100_000,
        '{"format": 1, "parts": ' + "[" * 100_000,
        "9" * 5000,
        "[" * (1 << 21),
    ):
        (copied[1] / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json (is damaged|has 2097152 bytes)"):
            Recognizer.from_folder(copied[1], device="cpu")


def test_a_recipe_runs_code_even_for_its_help(tmp_path):
    """As docs/untrusted.md says: HyperPyYAML does, and so a stranger's file is not to be used."""
    path = tmp_path / "theirs.yaml"
    text = (runs.ROOT / "hparams" / CTC).read_text()
    path.write_text(f"{text}\nx: !applyref:os.system [touch {tmp_path / 'evil'}]\n")
    top_level(path)  # what --help reads
    assert (tmp_path / "evil").exists()
    assert "A YAML file can run any code, even for its --help" in runs.launch.HELP


def test_tuning_runs_code_of_the_runs_hyperparams(copied, tmp_path):
    """As docs/untrusted.md and the help say."""
    path = copied[0] / "hyperparams.yaml"
    path.write_text(f"{path.read_text()}\nx: !applyref:os.system [touch {tmp_path / 'evil'}]\n")
    with runs.own_logging():
        tune.load(copied[0], "cpu")
    assert (tmp_path / "evil").exists()
    assert "RUN must be your own, or of somebody you trust" in tune.parser().format_help()
