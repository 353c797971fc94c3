#!/usr/bin/env python3
"""Package a trained model: python package.py results/CTC/conmamba_large/3402 --output DIR"""

from inference.package import package
from modules.command import argument_parser, plain_errors

EXAMPLES = """
examples:
  python package.py results/CTC/conmamba_large/3402 --output packages/conmamba
  python package.py results/S2S/conmamba_large/3402 --output packages/s2s --overwrite

DIR gets: model.ckpt (the average that the test stage evaluates), normalizer.ckpt,
tokenizer.ckpt and lm.ckpt where the model has them, config.json (how to build it),
src/ (the code it needs), README.md (the model card), and interface.py and
hyperparams.yaml for SpeechBrain's foreign_class. It can be moved, copied and made
read-only. Nothing is downloaded.

then, in Python:
  from inference import Recognizer
  print(Recognizer.from_folder("DIR").transcribe("speech.flac").text)
"""


def main():
    parser = argument_parser(
        "Turn a training's output folder into one folder that transcribes.", EXAMPLES
    )
    parser.add_argument("run", help="the output_folder of a training, with hyperparams.yaml")
    parser.add_argument("--output", required=True, metavar="DIR", help="the package to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier package")
    parser.add_argument(
        "--no-lm",
        action="store_true",
        help="leave out the language model of a run with no_lm: False",
    )
    arguments = parser.parse_args()
    with plain_errors("interrupted; there is no new package"):
        path = package(
            arguments.run, arguments.output, arguments.overwrite, use_lm=not arguments.no_lm
        )
        print(f"wrote {path}; read {path / 'README.md'}")


if __name__ == "__main__":
    main()
