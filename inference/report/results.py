"""docs/results.json: the tables and rows of docs/results.md, each number in one place.

tables : [{"name", "title", "test_sets"}], in the order in which they are shown.
rows : one a configuration and table: {"table", "name", "commands", "runs"}, and where known
    "intervals" {test set: {"WER", "CER"}}, "against" {"name", test set: ...}, "figure", "note".
commands : what to run, in order; {data}, {seed} and {output} stand for the folder that holds the
    corpora, the seed, and the output folder.
runs : one a seed: {"seed", "commit", "hardware", "steps", "minutes", "dev", "test"}; null where it
    was not written down. Rates are in percent: "dev" {"WER"}, "test" {test set: {"WER", "CER"}},
    there with "WER_interval" and "CER_interval", [low, high], where they are known.
"""

import json
import os
from pathlib import Path

from modules.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results.json"
RUN_KEYS = ("seed", "commit", "hardware", "steps", "minutes", "dev", "test")


def read_results(path=RESULTS):
    """{"tables", "rows"}; UserError for what is not as above."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    try:
        check(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not as inference/report/results.py describes: {type(error).__name__} "
            f"{error}"
        ) from None
    return found


def check(found):
    """UserError for rows that cannot be shown or run."""
    names = [table["name"] for table in found["tables"]]
    seen = set()
    for row in found["rows"]:
        key = row["table"], row["name"]
        if row["table"] not in names:
            raise UserError(f"row {key} is of no table; there are {', '.join(names)}")
        if key in seen:
            raise UserError(f"row {key} is there twice")
        seen.add(key)
        if not row["commands"] or "{output}" not in row["commands"][-1]:
            raise UserError(f"row {key}: its last command must write to {{output}}")
        for run in row["runs"]:
            if missing := [k for k in RUN_KEYS if k not in run]:
                raise UserError(f"row {key}: a run lacks {', '.join(missing)}")
            for rates in (run["dev"], *run["test"].values()):
                for name, rate in rates.items():
                    list(map(float, rate)) if name.endswith("_interval") else float(rate)


def table_of(results, name):
    """A table; UserError with the names that there are."""
    for table in results["tables"]:
        if table["name"] == name:
            return table
    names = ", ".join(t["name"] for t in results["tables"])
    raise UserError(f"there is no table {name!r}; there are {names}")


def rows_of(results, name):
    """The rows of a table, in order: their numbers begin with 1."""
    return [row for row in results["rows"] if row["table"] == table_of(results, name)["name"]]


def put_row(results, row):
    """Add a row, or replace the one of the same table and name; a new table is made for it."""
    rows = results["rows"]
    same = [i for i, r in enumerate(rows) if (r["table"], r["name"]) == (row["table"], row["name"])]
    if same:
        kept = {k: rows[same[0]][k] for k in ("figure", "note") if k in rows[same[0]]}
        rows[same[0]] = kept | row
    else:
        rows.append(row)
    for table in results["tables"]:
        if table["name"] == row["table"]:
            return
    sets = list(row["runs"][0]["test"])
    title = row["table"].replace("-", " ").capitalize()
    results["tables"].append({"name": row["table"], "title": title, "test_sets": sets})


def write_results(results, path=RESULTS):
    """Write whole or not at all; a run is a line."""
    check(results)
    beside = Path(path).with_suffix(".partial")
    beside.write_text(layout(results) + "\n", encoding="utf-8")
    os.replace(beside, path)


def layout(value, depth=0):
    """JSON with what fits on a line on one line."""
    short = json.dumps(value, ensure_ascii=False)
    if (depth > 1 and len(short) + 2 * depth <= 400 and "commands" not in short) or not isinstance(
        value, list | dict
    ):
        return short
    if not value:
        return short
    pad, end = "  " * (depth + 1), "  " * depth
    if isinstance(value, list):
        inside = [pad + layout(v, depth + 1) for v in value]
        return "[\n" + ",\n".join(inside) + f"\n{end}]"
    inside = [f"{pad}{json.dumps(k)}: {layout(v, depth + 1)}" for k, v in value.items()]
    return "{\n" + ",\n".join(inside) + f"\n{end}}}"
