"""Convert a checkpoint folder of the published ConMamba code into one of this project's.

    python -m modules.convert SAVE/CKPT+2024... hparams/S2S/conmamba_large.yaml OUTPUT

OUTPUT becomes an output folder that can be evaluated or trained on:

    python train_S2S.py OUTPUT/hyperparams.yaml --output_folder OUTPUT --skip_train True ...
"""

import argparse
import os
import re
import tempfile
from pathlib import Path

import speechbrain as sb
import yaml

from modules.checkpoints import Checkpointer
from modules.command import plain_errors
from modules.errors import UserError
from modules.options import load, top_level, yaml_path
from modules.tensors import load_tensors
from modules.tokenizer import SPECIAL
from modules.upstream import convert, load_strictly

LABEL_LINE = re.compile(r"^(['\"])(.*)\1 => (\d+)$")


def split_modules(state_dict):
    """The parts of a published `model.ckpt`, a ModuleList: {"frontend", "transformer", heads}.

    Its members are told apart by their weights' names. Of two linear heads the first is the
    decoder's, the second CTC's, as the published recipes list them; one alone is CTC's.
    """
    members = {}
    for key, weight in state_dict.items():
        index, _, name = key.partition(".")
        if not index.isdigit():
            raise UserError(
                f"weight {key!r} does not begin with a module's number: model.ckpt is not a "
                "checkpoint of the published recipes"
            )
        members.setdefault(int(index), {})[name] = weight
    parts, heads = {}, []
    for index in sorted(members):
        names = list(members[index])
        if any(name.startswith("convblock_") for name in names):
            parts["frontend"] = {f"blocks.{k}": v for k, v in members[index].items()}
        elif any(name.startswith("encoder.layers.") for name in names):
            parts["transformer"] = members[index]
        elif all(name.startswith("w.") for name in names):
            heads.append({k.removeprefix("w."): v for k, v in members[index].items()})
        else:
            raise UserError(f"module {index} of model.ckpt is unknown: it begins with {names[0]!r}")
    missing = {"frontend", "transformer"} - parts.keys()
    if missing or not 1 <= len(heads) <= 2:
        raise UserError(
            f"model.ckpt holds {sorted(parts)} and {len(heads)} heads; expected a frontend, a "
            "transformer and one or two linear heads"
        )
    parts["ctc_head"] = heads[-1]
    if len(heads) == 2:
        parts["seq_head"] = heads[0]
    return parts


def load_parts(hparams, parts):
    """Load the converted parts strictly into the modules of a YAML file."""
    bidirectional = any(".mamba.A_b_log" in key for key in parts["transformer"])
    transformer = convert(parts["transformer"], bidirectional)
    weights = {
        "frontend": parts["frontend"],
        "ctc_head": parts["ctc_head"],
        "seq_head": parts.get("seq_head", {}),
        "encoder": below(transformer, "encoder."),
        "decoder": below(transformer, "decoder."),
    }
    modules = hparams["modules"]
    for name in ("decoder", "seq_head"):
        if weights[name] and name not in modules:
            raise UserError(
                f"model.ckpt holds a {name} and the YAML file has none; use an S2S file for a "
                "model with a decoder"
            )
    for name in weights.keys() & modules.keys():
        try:
            load_strictly(modules[name], weights[name])
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def below(state_dict, prefix):
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def load_statistics(normalize, path):
    """Read the feature statistics of `normalizer.ckpt`, old or new format."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the features cannot be normalised without it")
    stats = load_tensors(path)
    for name in ("count", "glob_mean", "glob_std"):
        if name not in stats:
            raise UserError(f"{path} lacks {name}: it is not an InputNormalization's file")
        setattr(normalize, name, stats[name])


def read_alphabet(path):
    """The characters of a SpeechBrain label encoder in the order of their ids, from 3 up."""
    labels = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no label encoder's text: {error}") from None
    for line in lines:
        match = LABEL_LINE.match(line)
        if match:
            labels[int(match[3])] = match[2]
    characters = [labels.get(i) for i in range(len(SPECIAL), len(labels))]
    if not characters or any(c is None or len(c) != 1 for c in characters):
        raise UserError(
            f"{path} does not list blank, bos, eos and then one character an id; found {labels}"
        )
    return "".join(characters)


def convert_folder(source, yaml_file, output, label_encoder=None):
    """Write OUTPUT/hyperparams.yaml and OUTPUT/save/CKPT+... from a published CKPT+... folder.

    Raises UserError for whatever does not fit; nothing is written then.
    """
    source, output = Path(source), Path(output)
    if not (source / "model.ckpt").is_file():
        raise UserError(f"{source} holds no model.ckpt; give one CKPT+... folder")
    if (output / "save").exists():
        raise UserError(f"{output} holds a run already; give another output folder")
    yaml_file = yaml_path(str(yaml_file))
    overrides = {"output_folder": str(output)}
    if label_encoder is not None:
        overrides["alphabet"] = read_alphabet(label_encoder)
    top_level(yaml_file, overrides)  # UserError where it is no recipe
    # The YAML file's checkpointer makes its folder when it is made: somewhere else until all fits.
    with tempfile.TemporaryDirectory() as scratch:
        hparams = load(yaml_file, {**overrides, "output_folder": scratch})
    state_dict = load_tensors(source / "model.ckpt")
    if not isinstance(state_dict, dict):
        raise UserError(f"{source / 'model.ckpt'} holds no weights by name; give a checkpoint")
    load_parts(hparams, split_modules(state_dict))
    load_statistics(hparams["normalize"], source / "normalizer.ckpt")
    os.makedirs(output, exist_ok=True)
    sb.create_experiment_directory(str(output), str(yaml_file), overrides, save_env_desc=False)
    recoverables = {"model": hparams["model"], "normalizer": hparams["normalize"]}
    checkpoint = Checkpointer(output / "save", recoverables).save_checkpoint(meta=read_meta(source))
    return checkpoint.path


def read_meta(source):
    """The published checkpoint's statistics; the worst ones where it has none."""
    path = source / "CKPT.yaml"
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {error}; copy it again, or remove it") from None
    found = meta.items() if isinstance(meta, dict) else ()
    kept = {k: v for k, v in found if isinstance(v, int | float)}
    return {"WER": float("inf"), "ACC": 0.0, "epoch": 0, **kept}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m modules.convert",
        description="Convert a checkpoint of the published ConMamba code into this project's.",
        epilog="Nothing is guessed: a weight that is missing, unknown or of another shape than "
        "the YAML file wants is an error. The checkpoint may be a stranger's: it is read as "
        "weights alone. The YAML file must not be, for it can run any code (docs/untrusted.md).",
    )
    parser.add_argument("source", help="a CKPT+... folder with model.ckpt and normalizer.ckpt")
    parser.add_argument("hparams", help="the YAML file of the same architecture")
    parser.add_argument("output", help="the output folder to make")
    parser.add_argument(
        "--label-encoder",
        help="CTC: label_encoder.txt of the published run, which sets the alphabet's order",
    )
    arguments = parser.parse_args()
    with plain_errors():
        path = convert_folder(
            arguments.source, arguments.hparams, arguments.output, arguments.label_encoder
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
