"""A package's files, read strictly: what is missing, unexpected or damaged is an error."""

import json

from torch import nn

from inference.parts import FORMAT, MODEL
from modules.errors import UserError
from modules.language_model import load_language_model
from modules.tensors import load_tensors, misfits
from modules.tokenizer import SubwordTokenizer

LARGEST = 1 << 20  # bytes of a configuration
NGRAM = "n-gram.arpa"  # a package's, of a CTC model
LENGTHS = ("whole_seconds", "window_seconds")


def load_parts(parts, config, folder):
    """Fill the parts of a configuration from a package's folder."""
    load_weights(model_of(parts), folder / "model.ckpt")
    load_statistics(parts["normalize"], folder / "normalizer.ckpt")
    if isinstance(parts["tokenizer"], SubwordTokenizer):
        parts["tokenizer"].load(present(folder / "tokenizer.ckpt"))
    if "language_model" in parts:
        add_language_model(parts, config["lm_weight"], config["lm_temperature"], folder)


def model_of(parts):
    """The parts with weights, named as in model.ckpt."""
    return nn.ModuleDict({name: parts[name] for name in MODEL if name in parts})


def add_language_model(parts, weight, temperature, folder):
    """Load lm.ckpt and let the search use it."""
    present(folder / "lm.ckpt")
    lm = load_language_model(parts["language_model"], folder)
    parts["search"].use_language_model(lm, weight, temperature)


def present(path):
    """The path; UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the package is incomplete; package again")
    return path


def read_config(path):
    """config.json as plain data; UserError when it is none, or of another format."""
    if not path.is_file() and (path.parent / "save").is_dir():
        raise UserError(
            f"{path.parent} is a training's output folder and no package; make one of it: "
            f"python package.py {path.parent} --output DIR"
        )
    if (size := present(path).stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size} bytes; no package's configuration has {LARGEST}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        form = config["format"]
        if form == FORMAT:
            {name: int(config[name]) for name in ("sample_rate", *LENGTHS) if name in config}
            config["sample_rate"], config["parts"].items()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path} is damaged, or no package's configuration") from None
    if form != FORMAT:
        raise UserError(
            f"{path} has format {form} and this code reads {FORMAT}; package again with this code"
        )
    return config


def load_weights(model, path):
    """Load strictly; UserError naming every missing, unexpected or misshapen weight."""
    weights = load_tensors(present(path))
    if lines := misfits(model, weights, "config.json"):
        raise UserError(f"{path} does not fit config.json:\n{lines}")
    model.load_state_dict(weights, strict=True)


def load_statistics(normalize, path):
    """Read the feature statistics of a package or a checkpoint."""
    stats = load_tensors(present(path))
    names = ("count", "glob_mean", "glob_std")
    if not isinstance(stats, dict) or set(stats) != set(names):
        raise UserError(f"{path} does not hold {', '.join(names)} and nothing else")
    if normalize.norm_type == "global" and not stats["glob_mean"].numel():
        raise UserError(f"{path} holds no statistics yet; train for at least one step")
    for name in names:
        setattr(normalize, name, stats[name])
