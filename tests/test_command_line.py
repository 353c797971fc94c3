"""The command line: one clear line and status 2 for a mistake in it; help; Ctrl-C."""

import dataclasses
import functools
import os
import re
import signal
import subprocess

import pytest

from modules import launch
from modules.errors import UserError
from modules.options import read_options
from tests.recipes import mistakes, runs
from tests.recipes.mistakes import call

CTC = "CTC/conmamba_tiny.yaml"
S2S = "S2S/conmambamamba_tiny.yaml"


@pytest.fixture
def fails(capfd, monkeypatch, tmp_path):
    """Call with a mistake; returns the one line that tells it."""
    return functools.partial(mistakes.told, capfd, monkeypatch, tmp_path / "run")


# ---- Names and kinds ----


@pytest.mark.parametrize(
    ("recipe", "yaml_file", "wanted"),
    [("CTC", "LM/mamba.yaml", "LM"), ("S2S", CTC, "CTC"), ("CTC", S2S, "S2S")],
)
def test_the_file_of_another_script(capfd, monkeypatch, tmp_path, recipe, yaml_file, wanted):
    argv = [runs.ROOT / "hparams" / yaml_file, "--output_folder", tmp_path / "run"]
    status, out, err = call(capfd, monkeypatch, recipe, argv)
    assert status == 2 and "Traceback" not in out + err
    assert f"is a file for train_{wanted}.py, not for train_{recipe}.py" in err
    assert not (tmp_path / "run/log.txt").exists()


def test_missing_yaml_names_the_nearest(capfd, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    status, _, err = call(capfd, monkeypatch, "CTC", ["hparams/CTC/conmamba_tinny.yaml"])
    assert status == 2
    assert "there is no file hparams/CTC/conmamba_tinny.yaml" in err
    assert "did you mean hparams/CTC/conmamba_tiny.yaml?" in err


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that takes no folders")
def test_a_place_that_takes_no_folder(capfd, monkeypatch):
    words = runs.arguments("CTC/conmamba_tiny.yaml", "/proc/nowhere")
    status, _, err = call(capfd, monkeypatch, "CTC", words)
    assert status == 2 and "Traceback" not in err
    assert "error: /proc/nowhere: " in err and "give another place" in err


def test_yaml_must_come_first(capfd, monkeypatch):
    status, _, err = call(capfd, monkeypatch, "CTC", ["--d_model", "8"])
    assert status == 2
    assert "the first argument is the YAML file" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--d_modl", "8"], "unknown option --d_modl; did you mean d_model?"),
        (["--lr_modle=1"], "did you mean lr_model?"),
        (["--max_grad_nrom", "1"], "did you mean max_grad_norm?"),
        (["--zzz"], "unknown option --zzz"),
        (["--num_layers", "2"], 'an argument of encoder: --encoder "{num_layers: VALUE}"'),
        (["16"], "unexpected '16'; options look like --key value"),
        (["--d_model"], "--d_model needs a value"),
        (["--d_model", "--seed", "1"], "--d_model needs a value"),
        (["--debug", "True"], "--debug is a switch and takes no value; leave True out"),
        (["--noprogressbar=1"], "--noprogressbar is a switch and takes no value"),
        (["--d_model", "small"], "d_model='small' must be a number, as its default 80"),
        (["--d_model", "16.5"], "d_model=16.5 must be a whole number"),
        (["--d_model", "0"], "d_model=0 must be positive"),
        (["--skip_train", "maybe"], "skip_train='maybe' must be True or False"),
        (["--train_splits", "train"], "train_splits='train' must be a list, such as"),
        (["--train_splits", "[2024]"], "2024"),
        (["--train_splits", "[]"], "train_splits is empty; name at least one split"),
        (["--train_splits", "[a"], "train_splits='[a' is no YAML"),
        (["--max_grad_norm", "big"], "max_grad_norm='big' must be a number"),
        (["--grad_accumulation_factor", "1.5"], "must be a whole number"),
        (["--grad_accumulation_factor", "0"], "grad_accumulation_factor=0 must be positive"),
        (["--optimizer_step_limit", "x"], "optimizer_step_limit='x' must be a whole number"),
        (["--precision", "fp8"], "precision='fp8' is unknown; use fp32, bf16, fp16"),
        (["--encoder", "big"], "encoder='big': encoder makes an object"),
        (["--encoder", "{num_layres: 2}"], "unexpected keyword argument 'num_layres'; it is given"),
        (
            ["--encoder", "{mixer: !name:modules.mamba.Mumba {}}"],
            "cannot be made by modules.mamba.Mu",
        ),
        (["--encoder", "{mixer: !name:modules.mamba.Mamba {x: 1}}"], "argument 'x'"),
        (["--encoder", "{mixer: !name:modules.mamba.Mamba x}"], "is no YAML; an example is {a: !"),
        (
            ["--encoder", "{mixer: !new:modules.mamba.Mamba {}}"],
            "encoder.mixer=!new:modules.mamba.Mamba makes an object, where a factory is expected; "
            "write !name:modules.mamba.Mamba",
        ),
        (["--activation", "!new:torch.nn.SiLU"], "expected; write !name:torch.nn.SiLU"),
        (
            ["--encoder", "!new:modules.encoder.Encoder {activation: !new:torch.nn.SiLU {}}"],
            "encoder.activation=!new:torch.nn.SiLU makes",
        ),
        (["--frontend", "!name:torch.nn.Linear {}"], "makes a factory, where an object is exp"),
        (["--encoder", "{mixer: !apply:os.getcwd []}"], "is no YAML"),
        (["--d_model", "!name:modules.mamba.Mamba {}"], "must be a number, as its default 80"),
        (["--encoder", "{num_layers: 0}"], "yaml: encoder: num_layers=0 must be at least 1"),
        (["--encoder", "{num_layers: a}"], "(modules/encoder.py:"),
        (["--frontend", "{channels: []}"], "channels must list a number for each block"),
        (["--normalize", "{norm_type: no}"], "('global', 'batch', 'sentence'); it is given norm_"),
        (["--d_model", "99999999999"], "encoder cannot be made by modules.encoder.Encoder: not en"),
        (["--seed", "-1"], "seed=-1 must be from 0 to 4294967295"),
        (["--data_parallel_backend"], "unknown option --data_parallel_backend"),
        (["--speeds", "[fast]"], "speeds=['fast'] must be percentages"),
        (["--speeds", "[0]"], "speeds=[0] must be percentages"),
        (["--noise_snr_low", "50"], "noise_snr_low=50 is above noise_snr_high=40"),
        (["--lr_model", "nan"], "lr_model='nan' must be a number"),
        (["--win_length", "60"], "win_length=60 ms are 960 samples, more than n_fft=400"),
        (["--blank_index", "5"], "blank_index=5 must be 0, as tokenizers and searches have it"),
        (["--time_drop_count_low", "7"], "time_drop_count_low=7 is above time_drop_count_high=2"),
        (["--time_drop_length_high", "6"], "time_drop_length_high=6 is one more than the longest"),
        (["--lr_model", "-1"], "lr_model=-1 must be positive"),
        (["--d_model", "inf"], "d_model=inf must be a whole number"),
        (["--weight_decay", "-1"], "weight_decay=-1 must be 0 or more"),
        (["--output_folder", ""], "output_folder is empty; give a folder"),
        (["--number_of_epochs", "-1"], "number_of_epochs=-1 must be positive"),
        (["--num_workers", "-1"], "num_workers=-1 must be 0 or more"),
        (["--audio_cache_mb", "-1"], "audio_cache_mb=-1 must be 0 or more"),
        (["--normalize_until_epoch", "1"], "use 2 or more"),
        (["--n_warmup_steps", "0"], "n_warmup_steps=0 must be positive"),
        (["--max_nonfinite_steps", "0"], "max_nonfinite_steps=0 must be positive"),
        (["--nonfinite_patience", "9"], "did you mean max_nonfinite_steps?"),
        (["--initialization", "random"], "initialization='random' is unknown; use one of"),
        (["--scan_backend", "fast"], "fast"),
        (["--kernel_size", "4"], "kernel_size=4 must be odd; use 5"),
        (["--ema_decay", "1"], "ema_decay=1 would never leave"),
        (["--frontend", "{channels: [16, 16, 16]}"], '--encoder "{input_size: 32}"'),
        (["--ctc_head", "{in_features: 3}"], "ctc_head: in_features=3 does not fit the encoder"),
        (["--ctc_head", "{out_features: 30}"], "ctc_head: out_features=30 does not fit"),
        (["--opt_class", "{lr: a}"], "opt_class makes no optimizer"),
        (["--lr_scheduler", "{n_warmup_steps: 0}"], "n_warmup_steps=0 must be positive"),
    ],
)
def test_names_and_values(fails, tmp_path, words, message):
    assert message in fails(CTC, *words)
    assert not (tmp_path / "run/train.csv").exists()


def test_values_that_are_fine():
    argv = runs.arguments(
        CTC, "unused", lr_model="1e-3", n_warmup_steps="25e3", data_folder="/a=b c"
    )
    argv += ["--max_batch_length_train", "12.5", "--wandb_project", "1.0", "--max_grad_norm", "-1"]
    defaults = launch.top_level(argv[0])
    run_opts, overrides = launch.read_options(argv, defaults)
    assert overrides["lr_model"] == 0.001
    assert overrides["n_warmup_steps"] == 25000
    assert isinstance(overrides["n_warmup_steps"], int)
    assert overrides["max_batch_length_train"] == 12.5
    assert overrides["data_folder"] == "/a=b c"
    assert overrides["wandb_project"] == "1.0"
    assert run_opts.max_grad_norm == overrides["max_grad_norm"] == -1


def test_exponents_are_numbers_within_a_value_too(tmp_path):
    mixer = "!name:modules.attention.RoPEAttention {num_heads: 2, dropout: 1e-2}"
    argv = runs.arguments(CTC, tmp_path, encoder=f"{{dropout: 2E-1, mixer: {mixer}}}")
    argv += ["--opt_class", "!name:torch.optim.AdamW {lr: 1e-3, betas: [9e-1, 98e-2]}"]
    _, hparams, *_ = launch.start(argv)
    layer = hparams["encoder"].layers[0]
    assert (layer.conv.dropout.p, layer.mixer.attention.dropout) == (0.2, 0.01)
    (group,) = hparams["opt_class"](hparams["model"].parameters()).param_groups
    assert (group["lr"], tuple(group["betas"])) == (0.001, (0.9, 0.98))


# ---- Devices ----


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device='gpu' is unknown; use cuda, cuda:N, mps or cpu"),
        ("cuda:x", "device='cuda:x' is unknown"),
        ("cuda:7", r"device=cuda:7: (PyTorch sees no CUDA device; use|there are \d CUDA devices)"),
        ("mps", "device=mps is not present on this machine; use"),
    ],
)
def test_devices(fails, device, message, monkeypatch):
    if device == "mps":
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert re.search(message, fails(CTC, device=device))


@pytest.mark.parametrize("key", ["precision", "eval_precision"])
def test_fp16_on_the_cpu(fails, key):
    message = f"{key}=fp16 does not run on the CPU; use --{key} bf16 or fp32"
    assert message in fails(CTC, **{key: "fp16"})


def test_compiling_on_the_cpu(fails):
    message = "--compile needs a CUDA device, and this run is on cpu; leave it out"
    assert message in fails(CTC, "--compile")


@pytest.mark.parametrize(
    ("words", "backend", "message"),
    [
        (["--compile_mode", "max-autotune"], "auto", "compile_mode max-autotune is unknown here"),
        ([], "chunked", "not with scan_backend=chunked"),
    ],
)
def test_compiling_on_a_gpu(words, backend, message, monkeypatch):
    monkeypatch.delenv("MAMBA_ASR_SCAN_BACKEND", raising=False)
    options, _ = read_options(["recipe.yaml", "--compile", *words], {})
    with pytest.raises(UserError, match=message):
        launch.check_compilation(dataclasses.replace(options, device="cuda"), backend)


def test_compiling_with_a_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_SCAN_BACKEND", "naive")
    options, _ = read_options(["recipe.yaml", "--compile"], {})
    with pytest.raises(UserError, match="not with scan_backend=naive"):
        launch.check_compilation(dataclasses.replace(options, device="cuda"), "auto")


# ---- Help, and the real thing ----


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help(capfd, monkeypatch, argv):
    monkeypatch.chdir(runs.ROOT)
    status, out, _ = call(capfd, monkeypatch, "CTC", argv)
    assert status == 0
    assert "python train_CTC.py HPARAMS.yaml" in out
    assert "hparams/CTC/conmamba_large.yaml" in out
    assert max(map(len, out.splitlines())) <= 100


def test_nothing_given(capfd, monkeypatch):
    status, out, _ = call(capfd, monkeypatch, "S2S", [])
    assert status == 2
    assert "usage: python train_S2S.py" in out


@pytest.mark.parametrize("name", [CTC, S2S])
def test_help_of_one_file(capfd, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    argv = [runs.ROOT / "hparams" / name, "--help"]
    status, out, _ = call(capfd, monkeypatch, runs.recipe_of(name), argv)
    assert not status
    for words in (r"--d_model +80", r"--number_of_epochs +\d+", "--device ", "--precision "):
        assert re.search(words, out)
    assert "Wiring" not in out
    assert not list(tmp_path.iterdir())


def test_in_a_process_of_its_own(tmp_path):
    done = runs.run(runs.command(CTC, tmp_path / "run", d_modl=3))
    assert done.returncode == 2
    assert "error: unknown option --d_modl; did you mean d_model?" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run/log.txt").exists()


def test_interrupted_by_hand(tmp_path):
    process = subprocess.Popen(
        runs.command(CTC, tmp_path / "run", number_of_epochs=1000),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=runs.ROOT,
        env=runs.environment(),
        preexec_fn=runs.heed_interrupts,
    )
    runs.wait_for_epochs(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGINT: a checkpoint is saved after this step" in err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
