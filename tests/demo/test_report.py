import io
import json

import pytest
from rich.console import Console

from atlas_jax.demo.plot import write_plot
from atlas_jax.demo.report import (
    Results,
    Sample,
    ScoreRow,
    Swap,
    answer_table,
    exact_match_at,
    f1_at,
    recall_table,
    sample_panel,
    show,
    swap_panel,
    write_results,
)

RECALL = {"recall@1": 40.12, "recall@5": 66.0, "recall@20": 88.0}
ROWS = [
    ScoreRow("BM25", {"recall@1": 33.9, "recall@5": 60.5, "recall@20": 84.7}),
    ScoreRow("closed book", {exact_match_at(0): 6.1, f1_at(0): 9.2}),
    ScoreRow(
        "jointly trained",
        {exact_match_at(1): 24.0, f1_at(1): 31.2, exact_match_at(4): 29.04, f1_at(4): 35.2}
        | RECALL,
    ),
]
PASSAGE = (
    "Government type: republic. " * 20 + "Capital: name: Tirana (Tirane). " + "Flag: red. " * 20
)
SAMPLE = Sample(
    "What is the capital of Albania?", "Tirana", ["Tirana"], True, "Albania", "Government", PASSAGE,
    12.34, 1,
)  # fmt: skip
FOLLOWS = Swap("Who leads X?", "X", "Old Name", "New Name", "Old Name", "New Name", True)
STAYS = Swap("Who leads Y?", "Y", "Old", "New", "Old", "Old", False)
ASTRAY = Swap("Who leads Z?", "Z", "Old", "New", "Old", "Else", False)


def _text(*renderables):
    console = Console(file=io.StringIO(), width=110, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def _lines(table):
    return {line.split("  ")[0].strip(): line for line in _text(table).splitlines()}


def test_the_tables_show_measured_figures_and_dashes():
    answers, found = _lines(answer_table(ROWS, (1, 4), "c")), _lines(recall_table(ROWS))
    assert answers["jointly trained"].split()[2:] == ["–", "24.0/31.2", "29.0/35.2"]
    assert answers["closed book"].split()[2:] == ["6.1/9.2", "–", "–"]
    assert "BM25" not in answers and "closed book" not in found
    assert found["BM25"].split()[1:] == ["33.9", "60.5", "84.7"]
    assert found["jointly trained"].split()[2:] == ["40.1", "66.0", "88.0"]


def test_the_tables_fit_on_a_narrow_terminal():
    scores = {name(k): 50.0 for k in (1, 4, 8, 16) for name in (exact_match_at, f1_at)}
    closed = {exact_match_at(0): 10.0, f1_at(0): 12.0}
    rows = [ScoreRow("closed book", closed), ScoreRow("jointly trained", scores | RECALL)]
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(answer_table(rows, (1, 4, 8, 16), "c"))
    assert console.file.getvalue().count("50.0/50.0") == 4
    assert "10.0/12.0" in console.file.getvalue() and "…" not in console.file.getvalue()


def test_a_sample_shows_answer_source_score_and_the_place_in_the_passage():
    text = _text(sample_panel(SAMPLE, 1))
    for part in (
        "1. What is the capital of Albania?",
        "Tirana  (right)",
        "Albania",
        "score 12.34, rank 1",
    ):
        assert part in text
    assert "Capital: name: Tirana" in text
    assert len(text) < 110 * 9  # an excerpt, not the whole passage


def test_a_wrong_answer_is_called_wrong_and_the_accepted_ones_are_shown():
    wrong = Sample("q?", "", ["Tirana", "Tirane"], False, "A", "G", "nothing here", 1.0, 1)
    text = _text(sample_panel(wrong, 2))
    assert "(nothing)  (wrong)" in text and "accepted  Tirana, Tirane" in text


def test_the_swap_panel_counts_every_swap_and_shows_one_that_was_followed():
    text = " ".join(_text(swap_panel([STAYS, FOLLOWS, ASTRAY])).split())
    assert "Who leads X?" in text and "New Name → New Name" in text
    assert "1 of 3 swaps" in text
    none = " ".join(_text(swap_panel([STAYS])).split())
    assert "0 of 1 swaps" in none and "Who leads Y?" in none


@pytest.fixture
def results():
    return Results(
        setup={"test_questions": 2, "about": "about 1 country", "reads": (1, 4)},
        rows=ROWS,
        samples=[SAMPLE],
        swaps=[FOLLOWS],
        seconds={"index": 1.5},
    )


def test_results_are_written_as_json(results, tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, results)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["rows"][2]["scores"]["recall@5"] == 66.0
    assert stored["samples"][0]["passage"] == PASSAGE
    assert stored["swaps"][0]["follows"] is True


def test_show_prints_everything(results, tmp_path):
    console = Console(file=io.StringIO(), width=110, color_system=None)
    show(console, results, tmp_path / "plot.png", tmp_path / "results.json")
    text = console.file.getvalue()
    for part in ("index swap", "jointly trained", "plot.png", "results.json", "2 questions"):
        assert part in text


def test_the_plot_is_a_png_without_leftovers(tmp_path):
    path = tmp_path / "demo.png"
    write_plot(path, ROWS, (1, 4), "2 questions")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"]
