"""claims.png: a panel for each group, a bar for each row, a dot for each seed."""

import math
import os
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from atlas_jax.claims.pairs import Pair
from atlas_jax.claims.results import Results, row_name
from atlas_jax.claims.rows import Group, Row
from atlas_jax.demo.plot import INK, STYLE, save_png
from atlas_jax.demo.report import HEADINGS

_BAR, _BASELINE, _DOT, _PALE = "#3a87c0", "#b8bfc7", "#0b3c5d", "#6b7280"
_WIDE = 38  # characters of a title's line


def write_figure(
    path: str | os.PathLike[str], groups: Sequence[Group], results: Results, pair: Pair
) -> None:
    """Write the figure as a PNG, atomically; rows that have not run are named as such."""
    columns = 2
    lines = [groups[at : at + columns] for at in range(0, len(groups), columns)]
    heights = [max(len(group.rows) for group in line) + 2.2 for line in lines]
    with plt.rc_context({**STYLE, "font.size": 9.0, "ytick.color": INK}):
        figure, axes = plt.subplots(
            len(lines),
            columns,
            figsize=(12.0, 0.34 * sum(heights) + 0.9),
            gridspec_kw={"height_ratios": heights},
            squeeze=False,
        )
        for axis in axes.flat:
            axis.set_visible(False)
        for line, group_axes in zip(lines, axes, strict=True):
            for group, axis in zip(line, group_axes, strict=False):
                axis.set_visible(True)
                _panel(axis, group, results)
        figure.suptitle(
            f"The paper's claims, shown with the {pair.recipe.name} pair",
            x=0.012,
            y=0.995,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        figure.text(
            0.012,
            0.974,
            f"bar: mean, line: ± standard deviation, dots: seeds; blue: what the paper makes a "
            f"claim of, grey: what it is compared with · {results.questions} questions",
            ha="left",
            va="top",
            fontsize=9,
            color=_PALE,
        )
        figure.tight_layout(rect=(0, 0, 1, 0.968), h_pad=1.6, w_pad=2.0)
        save_png(figure, path)


def _panel(axis: Any, group: Group, results: Results) -> None:
    """One group's rows, by its first metric."""
    metric = group.metrics[0]
    subjects = {claim.row for claim in group.claims}
    top = 1.0
    for place, row in enumerate(group.rows):
        found = results.summary(group, row, metric)
        if found is None:
            axis.text(0, place, "  not run", va="center", fontsize=8, color=_PALE)
            continue
        colour = _BAR if row.name in subjects else _BASELINE
        axis.barh(place, found.mean, 0.66, color=colour, zorder=2)
        end = max([found.mean + (found.spread or 0.0), *_values(group, row, metric, results)])
        if found.spread is not None:
            axis.errorbar(found.mean, place, xerr=found.spread, color=INK, capsize=2.5, lw=1)
        for value in _values(group, row, metric, results):
            axis.plot(value, place, "o", color=_DOT, ms=3, zorder=3)
        axis.annotate(
            f"{found.mean:.1f}", (end, place), (5, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
        top = max(top, end)
    axis.set_yticks(range(len(group.rows)), [row.name for row in group.rows])
    axis.set_ylim(len(group.rows) - 0.4, -0.6)
    axis.set_xlim(0, min(105.0, 1.18 * top) if math.isfinite(top) else 1.0)
    axis.tick_params(length=0)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color="#e5e8eb", linewidth=0.8)
    heading = HEADINGS.get(metric, metric.replace("_", " "))
    axis.set_xlabel(f"{heading}, %", fontsize=8, color=_PALE)
    axis.set_title(_broken(group.title), loc="left", fontsize=9.5, fontweight="bold", pad=6)


def _values(group: Group, row: Row, metric: str, results: Results) -> list[float]:
    """A row's score of each seed, in percent."""
    seeds = results.measured.get(row_name(group, row), {})
    name = row.reads.get(metric, metric)
    return [100.0 * one.scores[name] for one in seeds.values() if name in one.scores]


def _broken(title: str) -> str:
    """The title in lines that fit over a panel."""
    lines = [""]
    for word in title.split():
        if len(lines[-1]) + len(word) > _WIDE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
