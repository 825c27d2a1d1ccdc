"""The demo's plot: how well answers are found and read, as two panels of bars."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from atlas_jax.core.whole import whole_file
from atlas_jax.demo.report import RECALLS, ScoreRow, exact_match_at

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# Okabe and Ito's colour-blind safe hues: baselines in grey and pale, the full method in front.
_COLOURS = ("#b8bfc7", "#9ecae8", "#e6b34a", "#3a87c0", "#cc79a7", "#0b3c5d")
INK = "#24292f"
STYLE: dict[str, Any] = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b7bdc4",
    "xtick.color": INK,
    "ytick.color": "#6b7280",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def _bars(axis: Any, rows: Sequence[ScoreRow], metrics: Mapping[str, str]) -> None:
    """Groups of bars, one for each metric (with its heading), of the rows that have it."""
    places = {row.name: _COLOURS[n % len(_COLOURS)] for n, row in enumerate(rows)}
    shown = {m: [row for row in rows if m in row.scores] for m in metrics}
    width = 0.82 / max(1, *map(len, shown.values()))
    for group, (metric, some) in enumerate(shown.items()):
        for n, row in enumerate(some):
            place = group + (n - (len(some) - 1) / 2) * width
            bar = axis.bar(place, row.scores[metric], width * 0.92, color=places[row.name])
            axis.bar_label(bar, fmt="%.1f", padding=2, fontsize=8.5, color=INK)
    axis.set_xticks(range(len(metrics)), list(metrics.values()))
    axis.tick_params(length=0)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#e5e8eb", linewidth=0.8)
    highest = max((row.scores[m] for m, some in shown.items() for row in some), default=0.0)
    axis.set_ylim(0, min(112, max(5.0, 1.18 * highest)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(decimals=0))


def write_plot(
    path: str | os.PathLike[str], rows: Sequence[ScoreRow], reads: Sequence[int], subtitle: str
) -> None:
    """Write exact match by passages read, and recall at 1, 5, 20, as a PNG, atomically."""
    palette = {row.name: _COLOURS[n % len(_COLOURS)] for n, row in enumerate(rows)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2, figsize=(11.4, 4.8), gridspec_kw={"width_ratios": [1 + len(reads), 4.5]}
        )
        closed = {exact_match_at(0): "none"}
        _bars(axes[0], rows, closed | {exact_match_at(k): f"{k}" for k in reads})
        _bars(axes[1], rows, {name: name for name in RECALLS})
        title = "Exact match, by passages read"
        axes[0].set_title(title, loc="left", fontsize=11.5, pad=10)
        axes[1].set_title("A passage with the answer is found", loc="left", fontsize=11.5, pad=10)
        title = "Atlas after 64 examples"
        figure.suptitle(title, x=0.014, y=0.975, ha="left", fontsize=14, fontweight="bold")
        figure.text(0.014, 0.885, subtitle, ha="left", fontsize=9.5, color="#6b7280")
        handles = [plt.Rectangle((0, 0), 1, 1, color=palette[row.name]) for row in rows]
        figure.legend(
            handles,
            [row.name for row in rows],
            loc="lower center",
            ncols=len(rows),
            frameon=False,
            handlelength=1.0,
            handleheight=1.0,
            columnspacing=1.8,
        )
        figure.tight_layout(rect=(0, 0.07, 1, 0.9), w_pad=2.5)
        save_png(figure, path)


def save_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG, atomically, and close it."""
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=160, format="png")
    finally:
        plt.close(figure)
