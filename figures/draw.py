"""Draw the figures: the architecture from the code, error rates and speed from measured results.

python figures/draw.py            # as `make figures`: what docs/*.json hold results for
python figures/draw.py --output /tmp/look --format png
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures.architecture import draw_architecture  # noqa: E402
from figures.performance import draw_decoding, draw_lengths  # noqa: E402
from figures.style import save, styled  # noqa: E402


def points(results):
    """docs/results.json -> what is drawn of it: a point a seed of the rows that have a `figure`."""
    return [
        {**row["figure"], "test_set": name, "seed": run["seed"], "wer": rates["WER"],
         "cer": rates.get("CER")}
        for row in results["rows"]
        if "figure" in row
        for run in row["runs"]
        for name, rates in run["test"].items()
    ]  # fmt: skip


def draw_results(results):
    """Error rates: bars are means over seeds, dots are the seeds.

    results: what `points` gives, a list of {"corpus", "test_set", "model", "seed", "wer", "cer"},
    rates in percent.
    """
    corpora = sorted({(r["corpus"], r["test_set"]) for r in results})
    models = sorted({r["model"] for r in results})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for ax, metric in zip(axes, ("wer", "cer"), strict=True):
        values = defaultdict(list)
        for r in results:
            if r.get(metric) is not None:
                values[r["corpus"], r["test_set"], r["model"]].append(r[metric])
        width = 0.8 / len(models)
        for i, model in enumerate(models):
            for j, corpus in enumerate(corpora):
                seeds = values.get((*corpus, model))
                if not seeds:
                    continue
                x = j + (i - (len(models) - 1) / 2) * width
                mean = sum(seeds) / len(seeds)
                name = model if model not in ax.get_legend_handles_labels()[1] else None
                ax.bar(x, mean, width * 0.92, color=f"C{i}", alpha=0.55, label=name)
                ax.plot([x] * len(seeds), seeds, "o", color=f"C{i}", markersize=4)
                ax.annotate(f"{mean:.1f}", (x, max(seeds)), (0, 4), textcoords="offset points",
                            ha="center", fontsize=7.5)  # fmt: skip
        ax.set_xticks(range(len(corpora)), [f"{c}\n{t}" for c, t in corpora])
        ax.set_ylabel(f"{metric.upper()} %")
        ax.set_ylim(0, 1.15 * max(max(seeds) for seeds in values.values()))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7.5)
    return figure


def read(path):
    """A JSON file's content; None when it is missing."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"{path} is missing")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "figures", help="the folder to fill")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results.json")
    parser.add_argument(
        "--performance",
        type=Path,
        default=ROOT / "docs/performance.json",
        help="a list of the JSON lines that the benchmarks end with",
    )
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results, performance = read(arguments.results), read(arguments.performance)
    figures = {
        "architecture": draw_architecture,
        "results": lambda: draw_results(points(results)) if results else None,
        "lengths": lambda: draw_lengths(performance or []),
        "decoding": lambda: draw_decoding(performance or []),
    }
    with styled():
        for name, draw in figures.items():
            path = arguments.output / f"{name}.{arguments.format}"
            figure = draw()
            if figure is None:
                print(f"{path.name} is not drawn: there are no results for it")
            else:
                save(figure, path)


if __name__ == "__main__":
    main()
