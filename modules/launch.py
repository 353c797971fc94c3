"""From a command line to hparams, device and process group; a user's mistake gets one clear line."""

import dataclasses
import difflib
import os
import sys
from pathlib import Path

import speechbrain as sb
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

from modules.errors import UserError
from modules.ops import selective_scan

HELP = """Train and evaluate a speech recogniser.

usage: python {script} HPARAMS.yaml [--key value ...]
       torchrun --nproc-per-node N {script} HPARAMS.yaml [--key value ...]

Any top-level key of the YAML file can be given on the command line. Examples:

  python {script} {example} --data_folder /data/LibriSpeech
  python {script} {example} --data_folder /data/LibriSpeech \\
      --train_splits "[train-clean-100]" --number_of_epochs 30 --precision fp32
  python {script} {example} --skip_train True    # evaluate what was trained
  python {script} HPARAMS.yaml --help            # the keys of one file, with their defaults

Running the same command again continues a run that was interrupted. Results: train_log.txt and
wer_<test set>.txt in output_folder. Environment: python -m modules.environment

HPARAMS files here: {available}
"""

class Wiring:
    """Stands for the value of a key that makes an object."""


# SpeechBrain's run options that matter to users; the others work too.
SHOWN_OPTIONS = (
    "device precision eval_precision grad_accumulation_factor max_grad_norm debug debug_batches "
    "debug_epochs noprogressbar optimizer_step_limit ckpt_interval_minutes distributed_backend"
).split()


def run(main, script, example):
    """Call `main(argv)`; print a `UserError` without a stack trace and exit with status 2."""
    try:
        argv = sys.argv[1:]
        if not argv or argv[0] in ("-h", "--help"):
            available = ", ".join(sorted(str(p) for p in Path("hparams").glob("*/*.yaml")))
            print(HELP.format(script=script, example=example, available=available or "none"))
            sys.exit(0 if argv else 2)
        main(argv)
    except UserError as error:
        # Every rank meets the same mistake; one of them tells.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(argv):
    """Read the YAML file with the overrides, choose the device, join the process group.

    Returns (path of the YAML file, hparams, run options, overrides).
    Raises UserError for an unknown file, key, value or device.
    """
    path = yaml_path(argv[0])
    defaults = top_level(path)
    if "-h" in argv or "--help" in argv:
        print(describe(path, defaults))
        sys.exit(0)
    check_words(argv[1:], defaults)
    _, run_opts, text = RunOptions.from_command_line_args(argv)
    overrides = check_overrides(text, defaults)
    # Keys that are run options too are taken by SpeechBrain's parser; the copy of the YAML file
    # in the output folder is to say what ran.
    overrides |= {k: run_opts[k] for k in run_opts.overridden_args if k in defaults}
    run_opts = choose_device(run_opts)
    # The process group comes first: what the YAML file creates may ask for the rank.
    sb.utils.distributed.ddp_init_group(run_opts)
    try:
        with open(path, encoding="utf-8") as f:
            hparams = load_hyperpyyaml(f, overrides)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_values(hparams, run_opts)
    selective_scan.set_backend(hparams.get("scan_backend", "auto"))
    return path, hparams, run_opts, overrides


def nearest(word, known):
    """' did you mean ...?' for the closest of the known words, or ''."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def yaml_path(name):
    """The YAML file, or a UserError naming the closest one there is."""
    if name.startswith("-"):
        raise UserError(f"the first argument is the YAML file, not {name}")
    if Path(name).is_file():
        return name
    known = [str(p) for p in Path("hparams").glob("*/*.yaml")]
    raise UserError(f"there is no file {name}{nearest(name, known)}")


def top_level(path):
    """The YAML file's top-level keys, references resolved; `Wiring` for what is no plain value."""
    try:
        with open(path, encoding="utf-8") as f:
            root = yaml.compose(resolve_references(f))
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a HyperPyYAML file: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} holds no keys")
    loader = yaml.SafeLoader("")
    values = {}
    for key, node in root.value:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        plain = all(
            isinstance(n, yaml.ScalarNode) and not n.tag.startswith("!") for n in parts
        ) and not node.tag.startswith("!")
        values[key.value] = loader.construct_object(node, deep=True) if plain else Wiring
    return values


def check_words(words, defaults):
    """Every word is an option or the value of one."""
    flags = {f"--{name}" for name, value in RunOptions().as_dict().items() if value is False}
    expects_value = False
    for word in words:
        if word.startswith("--"):
            if expects_value:
                raise UserError(f"{expects_value} needs a value before {word}")
            key = word.partition("=")[0]
            name = key.removeprefix("--")
            known = {*defaults, *HELP_TEXTS, "jit_module_keys", "compile_module_keys"}
            if name not in known:
                raise UserError(f"unknown option {key}{nearest(name, sorted(known))}")
            expects_value = None if "=" in word or key in flags else key
        elif expects_value:
            expects_value = None
        else:
            raise UserError(f"unexpected {word!r}; options look like --key value")
    if expects_value:
        raise UserError(f"{expects_value} needs a value")


def check_overrides(text, defaults):
    """SpeechBrain's YAML text of overrides -> dict; a value must be of its default's kind."""
    try:
        overrides = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the command line's values: {error}") from None
    for key, value in overrides.items():
        overrides[key] = value = as_number(value) if is_number(defaults[key]) else value
        default = defaults[key]
        if isinstance(default, bool) != isinstance(value, bool) and isinstance(default, bool):
            raise UserError(f"{key}={value!r} must be True or False")
        if is_number(default) and not is_number(value):
            raise UserError(f"{key}={value!r} must be a number, as its default {default}")
        if isinstance(default, list) and not isinstance(value, list):
            raise UserError(f"{key}={value!r} must be a list, as its default {default}")
    return overrides


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(value):
    """YAML 1.1 reads 1e-3 as text: Python's float reads it as people mean it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_values(hparams, run_opts):
    """Mistakes in values that would otherwise show only after hours, or not at all."""
    for key in ("number_of_epochs", "batch_size", "avg_checkpoints", "max_batch_length_train"):
        if hparams[key] <= 0:
            raise UserError(f"{key}={hparams[key]} must be positive")
    if hparams["num_workers"] < 0:
        raise UserError(f"num_workers={hparams['num_workers']} must be 0 or more")
    for key in ("train_splits", "dev_splits", "test_splits"):
        if not hparams[key]:
            raise UserError(f"{key} is empty; name at least one split of {hparams['data_folder']}")
    precision = (
        run_opts["precision"] if "precision" in run_opts.overridden_args else hparams["precision"]
    )
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"precision={precision!r} is unknown; use fp32, bf16 or fp16")
    if precision == "fp16" and run_opts["device"] == "cpu":
        raise UserError("precision=fp16 does not run on the CPU; use --precision bf16 or fp32")
    tokens = hparams["tokenizer"]
    if hasattr(tokens, "labels") and len(tokens) != hparams["output_neurons"]:
        raise UserError(
            f"output_neurons={hparams['output_neurons']} does not fit the alphabet, which with "
            f"blank, bos and eos has {len(tokens)}; set --output_neurons {len(tokens)}"
        )


def choose_device(run_opts):
    """Fill in the device (the best present) and the backend of a distributed launch."""
    device = check_device(run_opts["device"] or best_device())
    local_rank = os.environ.get("LOCAL_RANK")
    chosen = {"device": device}
    if local_rank is not None:
        if device.startswith("cuda"):
            device = check_device(f"cuda:{local_rank}")
        elif device == "mps":
            device = "cpu"  # one Mac has one GPU
        chosen = {"device": device}
        if "distributed_backend" not in run_opts.overridden_args:
            chosen["distributed_backend"] = "nccl" if device.startswith("cuda") else "gloo"
    return dataclasses.replace(
        run_opts, **chosen, overridden_args=run_opts.overridden_args | set(chosen)
    )


def best_device():
    """cuda, mps or cpu, the first that is present."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name):
    """The device's name, or a UserError saying what is present."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind == "mps":
        if torch.backends.mps.is_available():
            return "mps"
        raise UserError(f"device={name} is not present on this machine; use {best_device()}")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"device={name!r} is unknown; use cuda, cuda:N, mps or cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(f"device={name}: PyTorch sees no CUDA device; use {best_device()}")
    if index and int(index) >= count:
        raise UserError(
            f"device={name}: there are {count} CUDA devices; use cuda:0 to cuda:{count - 1}"
        )
    return name


def describe(path, defaults):
    """The keys of one YAML file with defaults, and SpeechBrain's run options."""
    lines = [f"Keys of {path} and their defaults (docs/configuration.md explains each):\n"]
    for key, value in defaults.items():
        if value is not Wiring:
            lines.append(f"  --{key:<28} {value}")
    lines.append("\nRun options:\n")
    lines += [f"  --{name:<28} {HELP_TEXTS[name]}" for name in SHOWN_OPTIONS]
    return "\n".join(lines)
