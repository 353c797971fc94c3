"""A report as text, Markdown or JSON: one list of tables, three ways to write them."""

import json

from inference.report import analysis
from inference.report.rates import character_counts, difference, estimate, word_counts

HEAD = ("words", "errors", "sub", "del", "ins", "WER %")


def report(name, runs, others=(), top=10):
    """One test set: runs, each a list of utterances -> {"test_set", "rates", "tables", ...}.

    others: runs of another configuration on the same utterances, to be compared with.
    top: the most rows of a table of words or utterances.
    """
    rates = {}
    for metric, counts in (("WER", word_counts), ("CER", character_counts)):
        ours, theirs = [counts(r) for r in runs], [counts(r) for r in others]
        rates[metric] = estimate(ours)
        if others:
            rates[f"{metric} of the others"] = estimate(theirs)
            rates[f"{metric}, difference"] = difference(ours, theirs)
    return {
        "test_set": name,
        "utterances": len(runs[0]),
        "words": sum(len(u.reference) for u in runs[0]),
        "runs": len(runs),
        "rates": rates,
        "tables": list(tables(runs, top)),
    }


def tables(runs, top):
    """(title, head, rows) of every part of the analysis."""
    total = analysis.whole(runs)
    yield "all", ("", *HEAD), [("all", *cells(total))]
    speakers = analysis.by_speaker(runs)
    if speakers:
        yield "by speaker", ("speaker", *HEAD), counted(speakers, top)
    yield "by length of the utterance", ("length", *HEAD), counted(analysis.by_length(runs))
    yield "words with the most errors", ("word", *HEAD), counted(analysis.by_word(runs), top)
    pairs = [(times, a or "(none)", b or "(none)") for (a, b), times in analysis.confusions(runs)]
    yield "most frequent errors", ("times", "said", "heard"), pairs[:top]
    head = ("utterance", "errors", "words", "said", "heard")
    yield "worst utterances", head, analysis.worst(runs)[:top]


def counted(groups, top=None):
    return [(name, *cells(count)) for name, count in list(groups.items())[:top]]


def cells(c):
    wer = None if c.wer is None else round(c.wer, 2)
    return c.words, c.errors, c.substitutions, c.deletions, c.insertions, wer


def rate_rows(found):
    """(name, value, low, high, of each run) for people."""
    for name, rate in found["rates"].items():
        each = ", ".join(f"{value:.2f}" for value in rate.runs) if len(rate.runs) > 1 else ""
        yield name, f"{rate.value:.2f}", f"{rate.low:.2f} to {rate.high:.2f}", each


def heading(found):
    several = f", {found['runs']} runs" if found["runs"] > 1 else ""
    return f"{found['test_set']}: {found['utterances']} utterances, {found['words']} words{several}"


RATES = ("", "mean %", "95 % interval", "each run")


def as_text(found):
    lines = [heading(found), "", *columns(RATES, list(rate_rows(found)))]
    for title, head, rows in found["tables"]:
        lines += ["", title, *columns(head, rows)]
    return "\n".join(lines) + "\n"


def columns(head, rows):
    """Rows in columns of equal width; numbers to the right."""
    written = [[text(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*written, strict=True)]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]
    for row in written:
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        yield "  " + "  ".join(parts).rstrip()


def as_markdown(found):
    lines = [f"### {heading(found)}", "", *markdown_table(RATES, list(rate_rows(found)))]
    for title, head, rows in found["tables"]:
        if rows:
            lines += ["", f"**{title[0].upper()}{title[1:]}**", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def markdown_table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(text(cell).replace("|", "\\|") for cell in row) + " |"


def text(cell):
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def as_json(found):
    rates = {
        name: {"value": rate.value, "interval": [rate.low, rate.high], "runs": list(rate.runs)}
        for name, rate in found["rates"].items()
    }
    named = {title: [dict(zip(head, row, strict=True)) for row in rows]
             for title, head, rows in found["tables"]}  # fmt: skip
    out = {k: v for k, v in found.items() if k not in ("rates", "tables")}
    return json.dumps(out | {"rates": rates, "tables": named}, ensure_ascii=False)


FORMATS = {"text": as_text, "md": as_markdown, "json": as_json}
