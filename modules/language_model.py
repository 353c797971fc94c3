"""Pretrained tokenizers and language models, from a local folder or the hub."""

import os
import shutil
from pathlib import Path

from modules.errors import UserError
from modules.tensors import load_tensors


def fetch(source, filename, target):
    """Bring `filename` of a folder or hub repository to `target`; UserError when it cannot."""
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
    beside = Path(f"{target}.partial")
    shutil.copyfile(found, beside)
    os.replace(beside, target)


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


def fetch_language_model(source, folder):
    """Bring `lm.ckpt` to `folder` unless it is there; UserError when none is given."""
    if source is None:
        raise UserError(
            "no_lm is False but no language model is given; set --pretrained_lm_tokenizer_path "
            "to a folder or hub repository with lm.ckpt, or --no_lm True"
        )
    path = Path(folder) / "lm.ckpt"
    if not path.is_file():
        fetch(source, "lm.ckpt", path)


def load_language_model(make_lm, folder):
    """Build the language model and load `lm.ckpt` strictly; UserError when it does not fit."""
    path = Path(folder) / "lm.ckpt"
    model = make_lm()
    try:
        model.load_state_dict(load_tensors(path))
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"the weights in {path} do not fit the language model of the YAML file (make_lm): "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None
    return model.eval()
