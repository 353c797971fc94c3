"""python -m inference.report.rows RUN_FOLDER... : rows of docs/results.json from trainings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from inference.report.commands import command_of
from inference.report.folder import runs_of, same_utterances
from inference.report.rates import character_counts, difference, estimate, word_counts
from inference.report.results import RESULTS, ROOT, put_row, read_results, write_results
from modules.command import argument_parser, number, plain_errors
from modules.errors import UserError

EXAMPLES = """
examples:
  python -m inference.report.rows results/dropout/{1,2,3} --table ablations-digits \\
      --name "dropout 0.2" --hardware "NVIDIA H200" --against results/baseline/* --add
  python -m inference.report.rows results/ablations/* --each --table ablations-digits \\
      --hardware "NVIDIA H200" --minutes 3.5 --against results/ablations/baseline --add

RUN_FOLDERs are the seeds of one configuration: one row. A folder that holds such folders stands for
them. With --each every RUN_FOLDER is a row of its own, named as the folder; one that cannot be
read is reported, the others are done, and the exit status is 1; 2 when none can be read.

What a folder tells: hyperparams.yaml the seed and, against the recipe, the options; train_log.txt
the steps and the dev rates, the mean over the epochs that are averaged; wer_<test set>.txt the test
rates. summary.txt tells commit, hardware, minutes and command; older ones do not, and without
--commit, GIT_COMMIT or a git checkout the commit is left open. Without --add the row is printed.
Then: python reproduce.py --write-docs
"""


def parser():
    p = argument_parser(
        "Make rows of docs/results.json from the output folders of trainings.",
        EXAMPLES,
        "python -m inference.report.rows",
    )
    p.add_argument("folders", nargs="+", metavar="RUN_FOLDER")
    p.add_argument("--table", required=True, metavar="NAME", help="the table that the row is for")
    p.add_argument("--name", metavar="TEXT", help="what the row is called (without --each)")
    p.add_argument("--each", action="store_true", help="a row a folder, named as the folder")
    p.add_argument("--against", nargs="+", metavar="OTHER", default=[], help="a baseline's runs")
    p.add_argument("--test-set", action="append", metavar="NAME", help="one alone (all of them)")
    p.add_argument("--commit", help="in place of what the runs tell")
    p.add_argument("--hardware", metavar="TEXT", help="'NVIDIA H200', in place of what they tell")
    p.add_argument("--minutes", type=number, metavar="M", help="of a run, not what it tells")
    p.add_argument("--command", metavar="TEXT", help="with {data}, {seed} and {output}")
    p.add_argument("--before", action="append", default=[], metavar="TEXT", help="run before it")
    p.add_argument("--replace", action="append", default=[], metavar="OLD=NEW", help="in commands")
    p.add_argument(
        "--figure", metavar="CORPUS:MODEL", help="draw it in figures/results.svg, as that"
    )
    p.add_argument("--note", metavar="TEXT", help="a sentence for the table")
    p.add_argument("--add", action="store_true", help="put it into the file, not on stdout")
    p.add_argument("--results", default=RESULTS, metavar="FILE", help="(docs/results.json)")
    return p


def main():
    arguments = parser().parse_args()
    with plain_errors():
        failed = run(arguments)
    sys.exit(1 if failed else 0)


def run(arguments):
    """Make the rows; returns why some could not be made. UserError when none could."""
    if arguments.each == (arguments.name is not None):
        raise UserError("give --name for one row, or --each for one a folder")
    if arguments.figure and ":" not in arguments.figure:
        raise UserError(f"--figure {arguments.figure} must be CORPUS:MODEL, digits:ConMamba say")
    if wrong := [text for text in arguments.replace if "=" not in text]:
        raise UserError(f"--replace {wrong[0]} must be OLD=NEW")
    others = runs_of(arguments.against)
    groups = {arguments.name: arguments.folders}
    if arguments.each:
        groups = {Path(folder).resolve().name: [folder] for folder in arguments.folders}
        if len(groups) < len(arguments.folders):
            raise UserError("two of the folders have one name; make their rows one by one")
    results = read_results(arguments.results) if arguments.add else None
    failed = []
    for name, folders in groups.items():
        try:
            row = row_of(name, runs_of(folders), others, arguments)
        except UserError as error:
            if not arguments.each:
                raise
            failed.append(f"{name}: {error}")
            continue
        if results is None:
            print(json.dumps(row, ensure_ascii=False))
        else:
            put_row(results, row)
    if len(failed) == len(groups):
        raise UserError(f"no row can be made: {'; '.join(failed)}")
    for text in failed:
        print(f"error: {text}", file=sys.stderr)
    if results is not None:
        write_results(results, arguments.results)
        print(f"wrote {len(groups) - len(failed)} rows to {arguments.results}")
    return failed


def row_of(name, runs, others, arguments):
    """One row; UserError when the runs are not seeds of one configuration."""
    test_sets = arguments.test_set or list(runs[0].test_sets)
    entries = [run_entry(run, test_sets, arguments) for run in runs]
    seeds = [entry["seed"] for entry in entries]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{name}: a seed is there twice: {', '.join(map(str, seeds))}")
    commands = [*arguments.before, command(name, runs, entries, arguments)]
    for text in arguments.replace:
        old, _, new = text.partition("=")
        commands = [c.replace(old, new) for c in commands]
    row = {"table": arguments.table, "name": name, "commands": commands, "runs": entries}
    row["intervals"] = {}
    baseline = set(r.path.resolve() for r in others) != set(r.path.resolve() for r in runs)
    against = {}
    for test_set in test_sets:
        same = same_utterances([*runs, *others], test_set)
        for metric, counts in (("WER", word_counts), ("CER", character_counts)):
            ours, theirs = [counts(u) for u in same[: len(runs)]], same[len(runs) :]
            low_high = rounded(estimate(ours))[1]
            row["intervals"].setdefault(test_set, {})[metric] = low_high
            if theirs and baseline:
                value, low_high = rounded(difference(ours, [counts(u) for u in theirs]))
                of_set = against.setdefault(test_set, {})
                of_set[metric] = {"difference": value, "interval": low_high}
    if against:
        row["against"] = against
    if arguments.figure:
        row["figure"] = dict(zip(("corpus", "model"), arguments.figure.split(":", 1), strict=True))
    if arguments.note:
        row["note"] = arguments.note
    return row


def rounded(rate):
    return round(rate.value, 2), [round(rate.low, 2), round(rate.high, 2)]


def run_entry(run, test_sets, arguments):
    """What is written of one run."""
    sets = {}
    for name in test_sets:
        (utterances,) = same_utterances([run], name)
        sets[name] = {}
        for metric, counts in (("WER", word_counts), ("CER", character_counts)):
            rate, limits = rounded(estimate([counts(utterances)]))
            sets[name] |= {metric: rate, f"{metric}_interval": limits}
    dev = run.dev_rates()
    if not dev:
        warn(run, "no dev rates: train_log.txt or avg_checkpoints of hyperparams.yaml is missing")
    minutes = re.fullmatch(r"([\d.]+) min", run.summary.get("time", ""))
    minutes = float(minutes[1]) if minutes else None
    entry = {
        "seed": seed_of(run),
        "commit": arguments.commit or run.summary.get("commit") or commit(),
        "hardware": arguments.hardware or run.summary.get("hardware"),
        "steps": run.steps,
        "minutes": minutes if arguments.minutes is None else arguments.minutes,
        # Accuracies are logged as parts of one, rates in percent.
        "dev": {k: round(100 * v if k == "ACC" else v, 2) for k, v in dev.items()},
        "test": sets,
    }
    missing = [key for key in ("commit", "hardware", "steps", "minutes") if entry[key] is None]
    if missing:
        warn(run, f"not known: {', '.join(missing)}")
    return entry


def warn(run, text):
    print(f"{run.path}: {text}", file=sys.stderr)


def seed_of(run):
    seed = run.settings.get("seed", run.path.name)
    try:
        return int(seed)
    except (TypeError, ValueError):
        raise UserError(
            f"{run.path} does not tell its seed: it holds no hyperparams.yaml, and its name is "
            "none; rename it to the seed"
        ) from None


def commit():
    """GIT_COMMIT, or this checkout's commit; None where neither tells."""
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"][:7]
    git = ["git", "-C", str(ROOT)]
    try:
        done = subprocess.run([*git, "describe", "--always", "--dirty=+ changes"],
                              capture_output=True, text=True, check=False)  # fmt: skip
    except OSError:
        return None
    return done.stdout.strip() or None


def command(name, runs, entries, arguments):
    """The command that all runs share; UserError when they do not."""
    if arguments.command:
        if "{output}" not in arguments.command:
            raise UserError("--command must hold {output}, and {data} and {seed} where it has them")
        return arguments.command
    found = {}
    for run, entry in zip(runs, entries, strict=True):
        text, problems = command_of(run, entry["commit"])
        for problem in problems:
            if not any(problem.find(t.partition("=")[0]) >= 0 for t in arguments.replace):
                warn(run, problem)
        found.setdefault(text, run)
    if len(found) > 1:
        (a, first), (b, other) = list(found.items())[:2]
        raise UserError(
            f"{name}: {first.path} and {other.path} are no seeds of one configuration:\n  {a}\n"
            f"  {b}\ngive only seeds of one, or --command"
        )
    return next(iter(found))


if __name__ == "__main__":
    main()
