"""Loss and error rate by epoch, from train_log.txt of one run or several."""

import matplotlib.pyplot as plt

PANELS = (  # (label, {statistic: (line, name)})
    ("loss", {"train loss": ("--", "training"), "valid loss": ("-", "dev")}),
    ("dev error rate, %", {"valid WER": ("-", "WER"), "valid CER": (":", "CER")}),
)
MOST = 100  # percent: where an axis of error rates ends, for a model that starts may have 500


def draw_curves(logs):
    """logs: {name of a run: [{"epoch", "train loss", "valid WER", ...} of an epoch]}."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for ax, (label, statistics) in zip(axes, PANELS, strict=True):
        for i, epochs in enumerate(logs.values()):
            for statistic, (line, _) in statistics.items():
                points = [(e["epoch"], e[statistic]) for e in epochs if statistic in e]
                # One validation search in many epochs leaves single points.
                marker = "o" if len(points) < 5 else None
                ax.plot(*zip(*points, strict=True) if points else ([], []), line,
                        marker=marker, markersize=3, color=f"C{i}", linewidth=1.2)  # fmt: skip
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        kinds = [plt.Line2D([], [], color="0.4", linestyle=line, label=name)
                 for line, name in statistics.values()]  # fmt: skip
        ax.add_artist(ax.legend(handles=kinds, frameon=False, fontsize=7.5, loc="upper right"))
    axes[1].set_ylim(top=min(MOST, axes[1].get_ylim()[1]))
    if len(logs) > 1:
        names = [plt.Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(logs)]
        figure.legend(handles=names, frameon=False, fontsize=7.5, loc="outside lower center",
                      ncols=min(4, len(names)))  # fmt: skip
    return figure
