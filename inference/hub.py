"""Where a package is: a folder here, or a name on the Hugging Face hub, user/model[@revision]."""

import re
from pathlib import Path

from inference.files import NGRAM
from modules.errors import UserError

# What is read, and nothing that could be run: no src/, interface.py or hyperparams.yaml.
FILES = (
    *("config.json", "model.ckpt", "normalizer.ckpt", "tokenizer.ckpt", "lm.ckpt", NGRAM),
    "README.md",
)
NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")


def located(source):
    """A folder, or a name on the hub -> the folder, downloaded once and kept in the hub's cache.

    Without a network, what an earlier call brought is used. UserError when there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, and here a package is wanted, the folder that package.py makes; "
            "of an export give the package that it was made of (transcribe.py and score.py alone "
            "take a file .onnx)"
        )
    name = NAME.fullmatch(str(source))
    # A mistake in the name of a folder here is no reason to ask others for it.
    if name is None or folder.parent.is_dir():
        raise UserError(
            f"there is no folder {folder}; package.py makes one from a training, and user/model "
            "names one on the Hugging Face hub"
        )
    import huggingface_hub

    try:
        repo, revision = name.groups()
        found = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=FILES)
    except Exception as error:  # of HTTP, of the hub, of the file system: they share no class
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise UserError(
            f"{source} is no folder here and cannot be had from the Hugging Face hub: {reason}; "
            "check the name and the network, or copy the package here and give its folder"
        ) from error
    return Path(found)
