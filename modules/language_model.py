"""Pretrained tokenizers and language models, from a local folder or the hub."""

import json
import re
import shutil
from pathlib import Path

from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from torch import nn

from modules.errors import UserError
from modules.lm.mamba_lm import MambaLM
from modules.tensors import load_tensors
from modules.whole import whole

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DESCRIPTION = "lm.json"  # beside lm.ckpt: {"new": class, argument: value, ...}
# What a description may name, and nothing else.
CLASSES = {
    "modules.lm.mamba_lm.MambaLM": MambaLM,
    "speechbrain.lobes.models.transformer.TransformerLM.TransformerLM": TransformerLM,
    "torch.nn.GELU": nn.GELU,
    "torch.nn.ReLU": nn.ReLU,
    "torch.nn.SiLU": nn.SiLU,
}

# Of a folder without description: the Transformer of make_lm in hparams/S2S.
PUBLISHED = {
    "d_model": 768,
    "nhead": 12,
    "num_encoder_layers": 12,
    "num_decoder_layers": 0,
    "d_ffn": 3072,
    "dropout": 0.0,
    "activation": nn.GELU,
    "normalize_before": False,
}


def check_source(source):
    """UserError for what is neither a folder here nor a name on the hub, such as a mistyped path.

    A first part that is a folder here is never asked for elsewhere (as in `inference.hub`).
    """
    if Path(source).is_dir():
        return
    if not HUB_NAME.fullmatch(source) or Path(source).parent.is_dir():
        raise UserError(
            f"pretrained_lm_tokenizer_path={source} is no folder; give one with tokenizer.ckpt, or "
            "user/model of the Hugging Face hub"
        )


def fetch(source, filename, target):
    """Bring `filename` of a folder or hub repository to `target`; UserError when it cannot."""
    check_source(source)
    if Path(source).is_dir():
        found = Path(source) / filename
        if not found.is_file():
            held = ", ".join(sorted(p.name for p in Path(source).iterdir())[:8]) or "nothing"
            raise UserError(
                f"pretrained_lm_tokenizer_path={source} holds {held}, but no {filename}; "
                "give a folder with tokenizer.ckpt, and lm.ckpt when no_lm is False"
            )
    else:
        found = download(source, filename)
    with whole(target) as beside:
        shutil.copyfile(found, beside)


def download(source, filename):
    """Path of a hub file in the local cache; UserError when neither hub nor cache has it."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(source, filename)
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise UserError(
            f"pretrained_lm_tokenizer_path={source} is no folder here, and {filename} could not "
            f"be fetched from the hub ({type(error).__name__}); download it elsewhere and give "
            "the folder that holds it"
        ) from None


def find_tokenizer(source):
    """The SentencePiece model of a file, a language model's folder or a run's; or UserError."""
    source = Path(source)
    places = [source / n for n in ("tokenizer.ckpt", "tokenizer.model", "save/tokenizer.model")]
    for path in (source, *places):
        if path.is_file():
            return path
    raise UserError(
        f"{source} holds no tokenizer.ckpt and no save/tokenizer.model; give the folder of a "
        "language model, of an S2S run, or the file"
    )


def fetch_language_model(source, folder):
    """Bring `lm.ckpt`, and its description if it has one, to `folder`.

    From a folder anew each time; from the hub unless it is there. UserError when none is given, or
    when it is of other units than the run's tokenizer in `folder`.
    """
    if source is None:
        raise UserError(
            "no_lm is False but no language model is given; set --pretrained_lm_tokenizer_path "
            "to a folder or hub repository with lm.ckpt, or --no_lm True"
        )
    source, folder = str(source), Path(folder)
    check_source(source)
    local = Path(source).is_dir()
    if not local and (folder / "lm.ckpt").is_file():
        return
    check_units(Path(source) / "tokenizer.ckpt", folder / "tokenizer.model")
    fetch(source, "lm.ckpt", folder / "lm.ckpt")
    (folder / DESCRIPTION).unlink(missing_ok=True)
    if local and (Path(source) / DESCRIPTION).is_file():
        fetch(source, DESCRIPTION, folder / DESCRIPTION)


def check_units(theirs, ours):
    """UserError when a language model's tokenizer and a recogniser's are two."""
    both = theirs.is_file() and ours.is_file()
    if both and theirs.read_bytes() != ours.read_bytes():
        raise UserError(
            f"the language model speaks the units of {theirs}, and the recogniser those of {ours}; "
            f"train it with --tokenizer_path {ours}"
        )


def read_description(folder):
    """How the language model in a folder is built, as plain data; None where it does not say."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        return None
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        wrong = {description["new"]} - CLASSES.keys()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} describes no language model; train_LM.py writes it") from None
    if wrong:
        raise UserError(f"{path} names {wrong.pop()}; known are {', '.join(CLASSES)}")
    return description


def described(description, path):
    """The language model of a description, with fresh weights; UserError when it cannot be."""
    arguments = {k: v for k, v in description.items() if k != "new"}
    try:
        arguments |= {k: CLASSES[v["factory"]] for k, v in arguments.items() if isinstance(v, dict)}
        return CLASSES[description["new"]](**arguments)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} does not fit its language model: {error}") from None


def load_language_model(make_lm, folder):
    """Build the language model and load `lm.ckpt` strictly; UserError when it does not fit.

    make_lm: builds it where the folder has no description.
    """
    path, description = Path(folder) / "lm.ckpt", read_description(folder)
    model = described(description, path) if description else make_lm()
    whose = "its description" if description else "the language model of the YAML file (make_lm)"
    try:
        model.load_state_dict(load_tensors(path))
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"the weights in {path} do not fit {whose}: {str(error).splitlines()[-1].strip()}"
        ) from None
    return model.eval()
