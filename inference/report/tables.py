"""The tables of docs/results.md, written from docs/results.json between their marks."""

import re
import shlex

from inference.report.commands import quoted
from inference.report.render import markdown_table
from inference.report.results import ROOT, rows_of
from modules.errors import UserError

PAGE = ROOT / "docs/results.md"
MARK = "<!-- table {name}: python reproduce.py --write-docs writes it from results.json -->"
END = "<!-- end of table {name} -->"
MARKED = re.compile(r"<!-- table (\S+): .*?-->\n.*?<!-- end of table (\S+) -->\n", re.DOTALL)


def write_tables(page, results):
    """A page's text with all its tables anew; UserError unless it has a place for each."""
    shown = []

    def table(match):
        if match[1] != match[2]:
            raise UserError(f"the marks of table {match[1]} enclose the end of {match[2]}")
        shown.append(match[1])
        name = match[1]
        text = markdown(results, name)
        return f"{MARK.format(name=name)}\n\n{text}\n\n{END.format(name=name)}\n"

    out = MARKED.sub(table, page)
    if lacking := [t["name"] for t in results["tables"] if t["name"] not in shown]:
        marks = "\n".join(f"{MARK.format(name=n)}\n{END.format(name=n)}" for n in lacking)
        raise UserError(f"docs/results.md has no place for {', '.join(lacking)}; add\n{marks}")
    return out


def markdown(results, name):
    """One table with the options that its rows share."""
    (table,) = (t for t in results["tables"] if t["name"] == name)
    rows = rows_of(results, name)
    shared = shared_options(rows)
    sets = table["test_sets"]
    paired = any("against" in row for row in rows)
    head = ["", "command", "dev WER"]
    for test_set in sets:
        head.append(f"{test_set} WER, CER")
        head += ["against the baseline"] if paired else []
    head += ["each seed: dev WER, WER / CER", "steps", "min", "commit, hardware"]
    lines = [
        heading(shared, name),
        "",
        *markdown_table(head, list(body(rows, sets, shared, paired))),
    ]
    notes = [f"{i}: {row['note']}" for i, row in enumerate(rows, 1) if "note" in row]
    return "\n".join([*lines, *(["", "\n".join(notes)] if notes else [])])


def heading(shared, name):
    text = f"`python reproduce.py --table {name} --row N` runs a row again"
    if not shared:
        return f"{text}."
    options = "\n".join(fold(" ".join(quoted(w) for option in shared for w in option)))
    return f"{text}. Every command has besides:\n\n```\n{options}\n```"


def fold(text, width=110):
    """A line of options as several, cut before options."""
    lines = [""]
    for part in re.split(r" (?=--)", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + part
    return lines


def body(rows, sets, shared, paired):
    for i, row in enumerate(rows, 1):
        cells = [f"{i}. {row['name']}", shown_commands(row, shared), dev(row)]
        for test_set in sets:
            cells.append(rates(row, test_set))
            cells += [against(row, test_set)] if paired else []
        runs = row["runs"]
        cells.append("; ".join(each(run, sets) for run in runs))
        cells.append(among(f"{run['steps']:,}" if run["steps"] else None for run in runs))
        cells.append(among(number(run["minutes"]) for run in runs))
        places = ((run["commit"] or "?", run["hardware"] or "?") for run in runs)
        cells.append(among((", ".join(place) for place in places), "; "))
        yield cells


def among(values, between=", "):
    """Different values, each once."""
    return between.join(dict.fromkeys(v for v in values if v)) or "-"


def number(value):
    return None if value is None else f"{value:.1f}"


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def dev(row):
    wer, accuracy = (mean(run["dev"].get(m) for run in row["runs"]) for m in ("WER", "ACC"))
    return (number(wer) or "-") + (f" (ACC {accuracy:.1f})" if accuracy is not None else "")


def rates(row, test_set):
    """'WER [interval], CER' as means over the seeds."""
    sets = [run["test"].get(test_set, {}) for run in row["runs"]]
    wer, cer = (mean(rates.get(metric) for rates in sets) for metric in ("WER", "CER"))
    if wer is None:
        return "-"
    limits = row.get("intervals", {}).get(test_set, {}).get("WER")
    text = f"**{wer:.2f}**" + (f" [{limits[0]:.2f}, {limits[1]:.2f}]" if limits else "")
    return text if cer is None else f"{text}, {cer:.2f}"


def against(row, test_set):
    found = row.get("against", {}).get(test_set, {}).get("WER")
    if not found:
        return "-"
    low, high = found["interval"]
    return f"{found['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def each(run, sets):
    """'seed: dev, WER / CER' of one run, test sets apart by commas."""
    parts = [f"{run['dev']['WER']:.1f}"] if "WER" in run["dev"] else []
    for name in sets:
        if found := run["test"].get(name):
            parts.append(" / ".join(f"{found[m]:.2f}" for m in ("WER", "CER") if m in found))
    return f"{run['seed']}: {', '.join(parts)}"


def shared_options(rows):
    """Options, as tuples of words, that the last commands of all rows have; without the places."""
    every = [options(row["commands"][-1])[1] for row in rows]
    if len(every) < 2:
        return []
    return [o for o in every[0] if all(o in other for other in every[1:])]


def options(command):
    """A command as (words before the options, [(--option, value, ...)])."""
    words = shlex.split(command)
    start = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    found = []
    for word in words[start:]:
        if word.startswith("--"):
            found.append((word,))
        else:
            found[-1] += (word,)
    return words[:start], found


def shown_commands(row, shared):
    """Commands without the shared options, and without what every one has."""
    shown = []
    for command in row["commands"]:
        program, given = options(command)
        words = program[1:] if program[1:2] and program[1].endswith(".py") else program
        words = words + [quoted(w) for option in given if option not in shared for w in option]
        shown.append(f"`{' '.join(words)}`")
    return ", then ".join(shown)
