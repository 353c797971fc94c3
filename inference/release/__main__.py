"""python -m inference.release RUN --name NAME --output DIR: a model as a file of a release."""

import re
from pathlib import Path

from inference.release.building import KINDS, build, check
from modules.command import argument_parser, number, plain_errors
from modules.errors import UserError

EXAMPLES = """
examples:
  python -m inference.release results/CTC/digits/3402 --name conmamba-ctc-digits \\
      --data_folder /data/corpora/digits --notes digits.md --output release
  python -m inference.release --check release --data_folder /data/corpora
  python -m inference.release.start conmamba-ctc-digits.tar.gz results/start    # train on from it

The package is packed as NAME.tar.gz, unpacked in an empty folder, loaded there by a new process
without network and without this checkout, and made to transcribe the run's test sets. Nothing is
written unless: it is small enough; its texts are those of the weights as trained, every one; and
its WER is the test stage's. DIR gets NAME.tar.gz, NAME.md (the card), NAME.json (sizes, digests,
texts), and SHA256SUMS and RELEASE.md of all models there. docs/releasing.md has the procedure.
"""


def parser():
    p = argument_parser(
        "Build and check the files that a release of trained models attaches.",
        EXAMPLES,
        "python -m inference.release",
    )
    p.add_argument("run", nargs="?", metavar="RUN", help="a training's output folder")
    p.add_argument("--name", help="of the model and its files")
    p.add_argument("--output", metavar="DIR", help="the folder of the release's files")
    p.add_argument("--data_folder", metavar="DIR", help="the test recordings (the run's manifests)")
    p.add_argument("--notes", metavar="FILE", help="Markdown for the card: sources, licences")
    p.add_argument("--dtype", choices=("auto", *KINDS), default="auto",
                   help="matrices on disk (auto: the first that fits)")  # fmt: skip
    p.add_argument("--megabytes", type=number, default=30, metavar="M", help="the most (30)")
    p.add_argument("--tolerance", type=number, default=0.5, metavar="P",
                   help="points of WER between this device and the run's (0.5)")  # fmt: skip
    p.add_argument("--device", default="cpu", help="what the checks run on (cpu)")
    p.add_argument("--check", metavar="DIR", help="check the files of a release; build nothing")
    return p


def main():
    arguments = parser().parse_args()
    with plain_errors("interrupted; the release is as it was"):
        run(arguments)


def run(a):
    if a.check is not None:
        check(a.check, a.data_folder, a.device)
        return
    if not (a.run and a.name and a.output):
        raise UserError("give RUN, --name and --output, or --check DIR; --help has examples")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", a.name):
        raise UserError(
            f"--name {a.name!r} must be letters, digits, '-', '.' and '_': a file's name"
        )
    notes = ""
    if a.notes:
        try:
            notes = "\n" + Path(a.notes).read_text(encoding="utf-8").strip() + "\n"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--notes {a.notes} cannot be read: {error}") from None
    facts = build(
        a.run, a.name, a.output, a.data_folder, a.dtype, a.megabytes, a.tolerance, notes, a.device
    )
    print(f"{facts['sha256']}  {facts['file']}  {facts['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
