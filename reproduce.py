#!/usr/bin/env python3
"""Run a row of docs/results.md again: python reproduce.py --table digits --row 1"""

import shlex
import sys
from pathlib import Path

from inference.report.commands import joined
from inference.report.rerun import compare, compare_means, filled, measured, run_commands
from inference.report.results import RESULTS, ROOT, read_results, rows_of, table_of
from inference.report.rows import commit
from inference.report.tables import PAGE, write_tables
from modules.command import argument_parser, plain_errors
from modules.errors import UserError

EXAMPLES = """
examples:
  python reproduce.py --list
  python reproduce.py --table digits --row 1 --dry-run
  python reproduce.py --table digits --row 1 --seed 3402 --data_folder /data/corpora
  python reproduce.py --table demo --row 1 -- --device cpu
  python reproduce.py --write-docs

Rows and seeds left out: all of them. Runs go to OUTPUT/TABLE/ROW/SEED; the same command again
continues what was interrupted. Words after -- are added to the training's command.

Each rate is held against the interval that docs/results.json has for that seed; where it has none,
against the row's other seeds. A row was made at the commit beside it: check that out for its
code. Other hardware and other kernels give other last digits, and so other trainings.

exit status: 0 what can be told agrees; 1 something lies outside; 2 a mistake, or a command failed.
"""


def parser():
    p = argument_parser("Run rows of docs/results.md again, and compare.", EXAMPLES)
    p.add_argument("--table", metavar="NAME", help="a table of docs/results.md")
    p.add_argument("--row", type=int, action="append", metavar="N", help="its number, from 1 (all)")
    p.add_argument("--seed", type=int, action="append", metavar="S", help="one of its seeds (all)")
    p.add_argument(
        "--data_folder",
        default="data",
        metavar="DIR",
        help="holds the corpora by name (digits, LibriSpeech, ...), or is that corpus (data)",
    )
    p.add_argument("--output", default="results/reproduce", metavar="DIR", help="for the runs")
    p.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--list", action="store_true", help="print the tables and their rows")
    p.add_argument("--write-docs", action="store_true", help="write the tables of docs/results.md")
    p.add_argument(
        "--check-docs", action="store_true", help="exit with 1 where they are not current"
    )
    p.add_argument("--results", default=RESULTS, metavar="FILE", help="(docs/results.json)")
    p.add_argument("more", nargs="*", metavar="-- OPTION", help="for the training")
    return p


def main():
    arguments = parser().parse_args()
    with plain_errors("interrupted; the same command goes on"):
        agrees = run(arguments)
    sys.exit(0 if agrees else 1)


def run(arguments):
    """Do what was asked for; returns whether all agrees."""
    results = read_results(arguments.results)
    if arguments.write_docs or arguments.check_docs:
        return documents(results, arguments.write_docs)
    if arguments.list:
        show(results, arguments.table)
        return True
    if arguments.table is None:
        raise UserError("give --table NAME, --list or --write-docs; --help has examples")
    agrees = True
    for number, row in with_seeds(chosen_rows(results, arguments), arguments):
        print(f"# {arguments.table}, row {number}: {row['name']}", flush=True)
        agrees &= rerun(number, row, arguments)
    return agrees


def documents(results, write):
    page = PAGE.read_text(encoding="utf-8")
    current = write_tables(page, results)
    if current == page:
        print(f"{PAGE.name} is current")
    elif write:
        PAGE.write_text(current, encoding="utf-8")
        print(f"wrote {PAGE}")
    else:
        print(f"{PAGE.name} is not current: python reproduce.py --write-docs", file=sys.stderr)
    return write or current == page


def show(results, only):
    for table in [table_of(results, only)] if only else results["tables"]:
        print(f"{table['name']}: {table['title']}")
        for number, row in enumerate(rows_of(results, table["name"]), 1):
            seeds = ", ".join(str(run["seed"]) for run in row["runs"])
            print(f"  {number:>2}  {row['name']} (seeds {seeds})")


def chosen_rows(results, arguments):
    """[(number, row)]; UserError for a number that there is not."""
    rows = dict(enumerate(rows_of(results, arguments.table), 1))
    if unknown := [n for n in arguments.row or () if n not in rows]:
        raise UserError(f"--row {unknown[0]}: {arguments.table} has rows 1 to {len(rows)}")
    return [(number, rows[number]) for number in arguments.row or rows]


def seeds_of(row):
    return [run["seed"] for run in row["runs"]]


def with_seeds(rows, arguments):
    """Those that have all seeds of --seed; UserError for one of --row that has not, or for none."""
    wanted, kept = set(arguments.seed or ()), []
    for number, row in rows:
        if missing := wanted.difference(seeds_of(row)):
            has = ", ".join(map(str, seeds_of(row)))
            text = f"--seed {min(missing)}: row {number} has {has}"
            if arguments.row:
                raise UserError(text)
            print(f"# left out, {text}", flush=True)
        else:
            kept.append((number, row))
    if not kept:
        raise UserError(f"--seed: no row of {arguments.table} has these; --list shows which has")
    return kept


def rerun(number, row, arguments):
    """Run a row's seeds and say how they compare; returns whether nothing lies outside."""
    seeds = seeds_of(row)
    chosen = arguments.seed or seeds
    every, told = {}, []
    data, place = as_seen_here(arguments.data_folder), as_seen_here(arguments.output)
    for seed in chosen:
        output = place / arguments.table / str(number) / str(seed)
        commands = filled(row, seed, data, output, arguments.more)
        for words in commands:
            print(joined(words), flush=True)
        if arguments.dry_run:
            continue
        note_commit(row, seed)
        run_commands(commands)
        every[seed] = measured(output)
        told += say(compare(row, seed, every[seed]), arguments)
    if set(every) == set(seeds) and len(seeds) > 1:
        told += say(compare_means(row, every), arguments)
    return all(agrees is not False for _, agrees in told)


def say(told, arguments):
    """Print what was found, at once: later runs may fail. -> it, as a list"""
    told = list(told)
    if told and arguments.more:
        print(f"with {shlex.join(arguments.more)}, which the row has not:")
    for text, _ in told:
        print(text, flush=True)
    return told


def as_seen_here(path):
    """A path of the command line, for commands that run in the checkout."""
    return Path(path) if Path.cwd() == ROOT else Path(path).absolute()


def note_commit(row, seed):
    """Say when the row was made by other code than this."""
    (written,) = (run["commit"] for run in row["runs"] if run["seed"] == seed)
    here = commit()
    if written and here and not (here.startswith(written) or written.startswith(here)):
        print(f"# made at commit {written}; this is {here}", flush=True)


if __name__ == "__main__":
    main()
