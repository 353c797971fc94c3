"""python -m inference.report RESULTS_FOLDER...: rates with intervals, and where errors are."""

import sys
from pathlib import Path

from inference.report.folder import runs_of, same_utterances
from inference.report.render import FORMATS, report
from modules.checks import check_writable
from modules.command import argument_parser, plain_errors
from modules.errors import UserError

EXAMPLES = """
examples:
  python -m inference.report results/CTC/conmamba_small/3402
  python -m inference.report results/CTC/conmamba_small/* --test-set test-clean
  python -m inference.report results/ours/* --against results/baseline/* --format md
  python -m inference.report results/CTC/conmamba_small/* --figures figures/curves

Several folders are runs of one configuration, seeds for instance: the mean over them is given. A
folder that holds such folders stands for them.
Intervals are 95 % by bootstrap, 10,000 resamples of the utterances and, where there are several,
of the runs: a new training gives another rate. With --against every resample has the same
utterances on both sides; an interval of the difference without 0 is what tells models apart.

What is read: wer_<test set>.txt, which must be whole, and for --figures train_log.txt.
Rows for docs/results.json: python -m inference.report.rows --help
"""


def parser():
    p = argument_parser(
        "Error rates with intervals, and errors by word, speaker and length.",
        EXAMPLES,
        "python -m inference.report",
    )
    p.add_argument("folders", nargs="+", metavar="RESULTS_FOLDER", help="what a training wrote")
    p.add_argument("--against", nargs="+", metavar="OTHER", default=[], help="to compare with")
    p.add_argument("--test-set", action="append", metavar="NAME", help="one alone (all of them)")
    p.add_argument("--format", choices=FORMATS, default="text", help="what to write (text)")
    p.add_argument("--top", type=int, default=10, metavar="N", help="rows a table (10)")
    p.add_argument("--figures", metavar="DIR", help="curves of loss and error rate by epoch: SVG")
    return p


def main():
    arguments = parser().parse_args()
    with plain_errors():
        run(arguments)


def run(arguments):
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top} must be at least 1")
    if arguments.figures:
        check_writable("figures", Path(arguments.figures))
    runs, others = runs_of(arguments.folders), runs_of(arguments.against)
    names = arguments.test_set or shared([*runs, *others])
    for i, name in enumerate(names):
        found = same_utterances([*runs, *others], name)
        ours, theirs = found[: len(runs)], found[len(runs) :]
        if i and arguments.format != "json":
            print()
        print(FORMATS[arguments.format](report(name, ours, theirs, arguments.top)).rstrip("\n"))
    if arguments.figures:
        draw(arguments.figures, {str(r.path): r for r in [*runs, *others]})


def shared(runs):
    """Names of the test sets that all runs have; UserError if there is none."""
    names = [n for n in runs[0].test_sets if all(n in r.test_sets for r in runs)]
    left_out = sorted({n for r in runs for n in r.test_sets} - {*names})
    if not names:
        raise UserError(
            f"no test set is in all of these folders, which have {', '.join(left_out)}; name those "
            "of one test set"
        )
    if left_out:
        print(f"not in all folders, and left out: {', '.join(left_out)}", file=sys.stderr)
    return names


def draw(folder, runs):
    """Write curves.svg; UserError where matplotlib or the logs are missing."""
    try:
        from figures.curves import draw_curves
        from figures.style import save, styled
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("--figures needs matplotlib; pip install matplotlib") from None
    logs = {name: run.log[0] for name, run in runs.items()}
    for name, epochs in logs.items():
        if not epochs:
            raise UserError(f"{name} holds no train_log.txt with an epoch; leave out --figures")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with styled():
        save(draw_curves(logs), folder / "curves.svg")
    print(f"\nwrote {folder / 'curves.svg'}", file=sys.stderr)


if __name__ == "__main__":
    main()
