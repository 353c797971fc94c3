"""How every figure looks, and how it is written: the same bytes at every drawing."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

INK, FAINT = "#1f2933", "#616e7c"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and testable
    "svg.hashsalt": "mamba-asr",  # the same ids at every drawing
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "text.color": INK,
    "savefig.dpi": 110,
    "savefig.facecolor": "white",
}


def styled():
    """A context in which figures are drawn."""
    return plt.rc_context(STYLE)


def save(figure, path):
    """Write a figure without anything that changes from one drawing to the next."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
