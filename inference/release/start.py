"""python -m inference.release.start PACKAGE OUTPUT: a released model as a training's beginning."""

import shutil
import tempfile
from pathlib import Path

import torch

from inference.files import load_parts, read_config
from inference.parts import MODEL, build_parts
from inference.release.assets import unpack
from modules.checkpoints import Checkpointer
from modules.command import argument_parser, plain_errors
from modules.errors import UserError
from modules.whole import whole_folder

EXAMPLES = """
example, a model of digits trained on with speech of your own:
  python -m inference.release.start conmamba-ctc-digits.tar.gz results/start
  python train_CTC.py hparams/CTC/conmamba_small.yaml --resume results/start \\
      --data_folder data/mine --output_folder results/mine

PACKAGE is the archive, or a package's folder. The training needs the options that shape the model,
as they were: NAME.json of the release has the command. Weights and the features' statistics are
taken over; the optimiser, the learning rate's schedule and the count of epochs begin anew.
"""


def start(source, output):
    """Write OUTPUT/save/CKPT+... of a package, whole or not at all; returns its path."""
    source, output = Path(source), Path(output)
    if output.exists():
        raise UserError(f"{output} exists; give another folder")
    with tempfile.TemporaryDirectory(prefix="mamba-asr-release-") as scratch:
        package = unpack(source, scratch) if source.is_file() else source
        config = read_config(package / "config.json")
        parts = build_parts(config["parts"])
        load_parts(parts, config, package)
        # A checkpoint numbers the parts in the order of the recipes' `model`, which is this one.
        model = torch.nn.ModuleList(parts[name] for name in MODEL if name in parts)
        recoverables = {"model": model, "normalizer": parts["normalize"]}
        with whole_folder(output) as beside:
            # Worse than whatever training will reach, so that its own checkpoints are averaged.
            meta = {"WER": float("inf"), "ACC": 0.0, "epoch": 0}
            checkpoint = Checkpointer(beside / "save", recoverables).save_checkpoint(meta=meta)
            if (package / "tokenizer.ckpt").is_file():
                shutil.copyfile(package / "tokenizer.ckpt", beside / "save" / "tokenizer.model")
    return output / "save" / checkpoint.path.name


def main():
    parser = argument_parser(
        "Turn a released model into a folder that training can --resume.",
        EXAMPLES,
        "python -m inference.release.start",
    )
    parser.add_argument("package", metavar="PACKAGE", help="NAME.tar.gz, or a package's folder")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to make")
    arguments = parser.parse_args()
    with plain_errors("interrupted; nothing is written", "nothing is written"):
        path = start(arguments.package, arguments.output)
        print(f"wrote {path}; train with --resume {arguments.output}")


if __name__ == "__main__":
    main()
