"""What the demo shows at its end: a table, a plot, sample questions and a results file.

Everything here takes `Results` and measures nothing.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from atlas_jax.core.jsonl import atomic_text

RECALLS = ("recall@1", "recall@5", "recall@20")
EXACT_MATCH, F1 = "exact_match", "f1"
HEADINGS = {EXACT_MATCH: "EM", F1: "F1", **{name: name for name in RECALLS}}


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One line of the table: percentages by metric; a metric that does not apply is absent."""

    name: str
    scores: dict[str, float]


def exact_match_at(k: int) -> str:
    """The metric's name for answers that are read from k passages."""
    return f"{EXACT_MATCH} k={k}"


def f1_at(k: int) -> str:
    """See `exact_match_at`."""
    return f"{F1} k={k}"


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


def _cell(row: ScoreRow, metrics: Sequence[str], best: float | None) -> Text:
    """The row's figures of one column; the first of them decides whether it is the best."""
    values = [row.scores[metric] for metric in metrics if metric in row.scores]
    if not values:
        return Text("–", style="dim")
    shown = "/".join(f"{value:.1f}" for value in values)
    return Text(shown, style="bold green" if values[0] == best else "")


def answer_table(rows: Sequence[ScoreRow], reads: Sequence[int], caption: str) -> Table:
    """Exact match / F1 of the rows that answer, by the number of passages read.

    Args:
      reads: numbers of passages that answers were read from; 0 is added for closed book.
    """
    columns = {f"k = {k}": (exact_match_at(k), f1_at(k)) for k in (0, *reads)}
    return _table("EM/F1, k passages", columns, rows, caption)


def recall_table(rows: Sequence[ScoreRow]) -> Table:
    """How often a passage with the answer is found, of the rows that search."""
    return _table("retrieval", {name: (name,) for name in RECALLS}, rows, "")


def _table(
    title: str, columns: Mapping[str, tuple[str, ...]], rows: Sequence[ScoreRow], caption: str
) -> Table:
    """The rows that have a figure of these columns; the best of each column is set off."""
    table = Table(box=box.SIMPLE_HEAVY, caption=caption, caption_style="dim", pad_edge=False)
    table.add_column(title, no_wrap=True)
    shown = [row for row in rows if any(m in row.scores for ms in columns.values() for m in ms)]
    best: dict[str, float] = {}
    for heading, metrics in columns.items():
        table.add_column(heading, justify="right", no_wrap=True)
        values = [row.scores[metrics[0]] for row in shown if metrics[0] in row.scores]
        if len(values) > 1:
            best[heading] = max(values)
    for row in shown:
        cells = (_cell(row, metrics, best.get(name)) for name, metrics in columns.items())
        table.add_row(row.name, *cells)
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
    place = " · ".join(part for part in (sample.title, sample.section) if part)
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
    setup = results.setup
    caption = f"{setup['test_questions']:,} questions {setup['about']}"
    console.print(recall_table(results.rows))
    console.print(answer_table(results.rows, setup["reads"], caption))
    console.print(f"plot     {plot}", highlight=False, soft_wrap=True)
    console.print(f"results  {results_file}", highlight=False, soft_wrap=True)
