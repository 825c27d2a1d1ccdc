"""What the demo shows at its end: a table, a plot, sample questions and a results file.

Everything here takes `Results` and measures nothing.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from atlas_jax.core.jsonl import atomic_text

RECALLS = ("recall@1", "recall@5", "recall@20")
METRICS = ("exact_match", "f1", *RECALLS)
HEADINGS = {"exact_match": "EM", "f1": "F1", **{name: name for name in RECALLS}}


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One line of the table: percentages by metric; a metric that does not apply is absent."""

    name: str
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answered question, its source passage and the score and rank it was found with."""

    question: str
    answer: str
    accepted: list[str]
    correct: bool
    title: str
    section: str
    passage: str
    score: float
    rank: int


@dataclasses.dataclass(frozen=True)
class Swap:
    """One index swap: a passage with another value, and the answer before and after."""

    question: str
    title: str
    old_value: str
    new_value: str
    answer_before: str
    answer_after: str
    follows: bool  # the new answer is the new value


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that one run of the demo measured.

    Attributes:
      setup: what was run, name to value (passages, questions, steps, ...).
      rows: of the table, in its order.
      samples: questions with their sources.
      swaps: every swap that was tried.
      seconds: how long each stage took.
    """

    setup: dict[str, Any]
    rows: list[ScoreRow]
    samples: list[Sample]
    swaps: list[Swap]
    seconds: dict[str, float]


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write the results as one JSON file, atomically."""
    with atomic_text(path) as file:
        json.dump(dataclasses.asdict(results), file, ensure_ascii=False, indent=2)
        file.write("\n")


def _cell(row: ScoreRow, metric: str, best: float | None) -> Text:
    value = row.scores.get(metric)
    if value is None:
        return Text("–", style="dim")
    return Text(f"{value:.1f}", style="bold green" if value == best else "")


def score_table(rows: Sequence[ScoreRow], caption: str) -> Table:
    """The table of rows; the best value of each column is set off."""
    table = Table(box=box.SIMPLE_HEAVY, caption=caption, caption_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    best: dict[str, float] = {}
    for metric in METRICS:
        table.add_column(HEADINGS[metric], justify="right", no_wrap=True)
        values = [row.scores[metric] for row in rows if metric in row.scores]
        if len(values) > 1:
            best[metric] = max(values)
    for row in rows:
        table.add_row(row.name, *(_cell(row, metric, best.get(metric)) for metric in METRICS))
    return table


def _excerpt(sample: Sample, width: int) -> Text:
    """The passage around the answer, which is set off; its beginning where it holds none."""
    shown = next((a for a in sample.accepted if a.casefold() in sample.passage.casefold()), "")
    at = sample.passage.casefold().find(shown.casefold()) if shown else 0
    start = max(0, min(at - width // 2, len(sample.passage) - width))
    cut = sample.passage[start : start + width]
    text = Text(("…" if start else "") + cut + ("…" if start + width < len(sample.passage) else ""))
    if shown:
        text.highlight_words([shown], style="bold green", case_sensitive=False)
    return text


def sample_panel(sample: Sample, number: int, width: int = 260) -> Panel:
    """One question: the answer, whether it is right, and the passage it was read from."""
    verdict = ("right", "green") if sample.correct else ("wrong", "red")
    lines = [
        Text.assemble(
            "answer  ", (sample.answer or "(nothing)", f"bold {verdict[1]}"), f"  ({verdict[0]})"
        )
    ]
    if not sample.correct:
        lines.append(Text(f"accepted  {', '.join(sample.accepted)}", style="dim"))
    place = f"{sample.title} · {sample.section}"
    source = f"source  {place} · score {sample.score:.2f}, rank {sample.rank}"
    lines += [Text(source, style="cyan"), _excerpt(sample, width)]
    return Panel(
        Group(*lines),
        title=Text(f"{number}. {sample.question}", style="bold"),
        title_align="left",
        box=box.ROUNDED,
    )


def swap_panel(swaps: Sequence[Swap]) -> Panel:
    """The first swap that the answer followed, and the count of all that were tried."""
    followed = [swap for swap in swaps if swap.follows]
    changed = [s for s in swaps if not s.follows and s.answer_after != s.answer_before]
    lines: list[Text] = []
    for swap in (followed or swaps)[:1]:
        lines += [
            Text(swap.question, style="bold"),
            Text.assemble(
                "the index said    ", swap.old_value, " → ", (swap.answer_before, "bold")
            ),
            Text.assemble(
                "the index says    ",
                swap.new_value,
                " → ",
                (swap.answer_after, "bold green" if swap.follows else "bold red"),
            ),
        ]
    lines.append(
        Text(
            f"{len(followed)} of {len(swaps)} swaps: the answer became the new value; "
            f"{len(changed)}: it became something else; "
            f"{len(swaps) - len(followed) - len(changed)}: it stayed. No parameter changed.",
            style="dim",
        )
    )
    return Panel(Group(*lines), title="index swap", title_align="left", box=box.ROUNDED)


def show(console: Console, results: Results, plot: Path, results_file: Path) -> None:
    """Print samples, swap, table and where the files are."""
    for number, sample in enumerate(results.samples, 1):
        console.print(sample_panel(sample, number))
    if results.swaps:
        console.print(swap_panel(results.swaps))
    questions, countries = results.setup["test_questions"], results.setup["test_countries"]
    caption = f"{questions:,} questions about {countries} countries that training never named"
    console.print(score_table(results.rows, caption))
    console.print(f"plot     {plot}", highlight=False, soft_wrap=True)
    console.print(f"results  {results_file}", highlight=False, soft_wrap=True)
