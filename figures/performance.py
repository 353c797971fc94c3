"""Plots from the JSON lines that the benchmarks end with, collected in docs/performance.json."""

from functools import partial

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

NAMES = {
    "conmamba": "ConMamba",
    "conformer-relpos": "Conformer, relative positions",
    "conformer-rope": "Conformer, rotary positions",
}


def newest(reports, benchmark, keys, **wanted):
    """Rows of the last report that has any: those with numbers under `keys`, and `wanted` values.

    A row that tells why it failed has no numbers.
    """
    for report in reversed(reports):
        if report["benchmark"] != benchmark:
            continue
        rows = [
            row
            for row in report["rows"]
            if all(row.get(key) is not None for key in keys)
            and all(row.get(key) == value for key, value in wanted.items())
        ]
        if rows:
            return rows
    return []


def lines(ax, rows, x, y):
    """A line a model, points in the order of x."""
    for model in dict.fromkeys(row["model"] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row["model"] == model)
        ax.plot(*zip(*points, strict=True), "o-", markersize=4, label=NAMES.get(model, model))
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({row[x] for row in rows}))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)


def draw_lengths(reports):
    """Time and memory of an encoder's training step against utterance length, or None.

    Rows: benchmarks/inference.py, part "lengths", each model's last; every batch holds the same
    audio. Memory is left out where it was not measured, as on the CPU.
    """
    wanted = partial(newest, reports, "inference", ("seconds", "ms"), part="lengths")
    rows = [row for model in NAMES for row in wanted(model=model)]
    if not rows:
        return None
    measured = [row for row in rows if row.get("peak_gb") is not None]
    panels = [(rows, "ms", "encoder step, ms")]
    panels += [(measured, "peak_gb", "peak memory, GB")] if measured else []
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for ax, (points, key, label) in zip(axes[0], panels, strict=True):
        lines(ax, points, "seconds", key)
        ax.set_xlabel("utterance, s (the same audio in every batch)")
        ax.set_ylabel(label)
    axes[0, 0].legend(frameon=False, fontsize=7.5)
    return figure


def draw_decoding(reports):
    """Time of a beam search against length, or None.

    Rows: benchmarks/decoding.py, each with "model", "ms" and either "tokens", the length of the
    hypotheses, or "seconds", that of the audio.
    """
    for x, label in (("tokens", "tokens"), ("seconds", "audio, s")):
        rows = newest(reports, "decoding", (x, "ms", "model"))
        if len({row[x] for row in rows}) > 1:
            figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
            lines(ax, rows, x, "ms")
            ax.set_xlabel(label)
            ax.set_ylabel("search, ms")
            ax.legend(frameon=False, fontsize=7.5)
            return figure
    return None
