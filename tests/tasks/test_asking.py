"""A few questions lend their words to all titles: patterns, and the cloze task that uses them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.asking import Pattern
from atlas_jax.tasks.base import Example
from atlas_jax.tasks.cloze import ClozeRecord, ClozeTask

PASSAGES = {
    "Arvo": "Capital: name: Lindel; time: UTC+1. Highest point: Mount Ara 1,050 m.",
    "Bera": "Capital: name: Tomund; time: UTC+2. Highest point: Bel 880 m.",
    "Coro": "Chief of state: President Ada VOL. Head of government: President Ada VOL.",
    "Dela": "Chief of state: King Otto. Head of government: Premier Ina ESK.",
    "Emin": "Chief of state: President Tor HALL. Population: 5,000.",
}
QUESTIONS = (
    ("Name the capital of Arvo!", ["lindel"], "Arvo"),
    ("which city governs Bera", ["The Tomund"], "Bera"),
    ("What is Arvo's highest point?", ["Mount Ara"], "Arvo"),
    ("How many metres is the highest point of Arvo?", ["1,050 m"], "Arvo"),
    ("Who heads the government of Coro?", ["Ada Vol"], "Coro"),
    ("Who is chief of state in Coro?", ["Ada Vol", "Vol"], "Coro"),
)


def load(
    tmp_path: Path, questions: Any = QUESTIONS, **settings: Any
) -> tuple[ClozeTask, list[ClozeRecord]]:
    passages, asked = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(passages, ({"id": t, "title": t, "text": x} for t, x in PASSAGES.items()))
    fields = ("question", "answers", "gold")
    write_jsonl(asked, (dict(zip(fields, (q, a, [g]), strict=True)) for q, a, g in questions))
    task = ClozeTask(question_file=str(asked), **settings)
    return task, task.load(passages)


def draw(task: ClozeTask, records: list[ClozeRecord], times: int = 40) -> list[Example]:
    return [
        task.example(record, np.random.default_rng([turn, number]))
        for turn in range(times)
        for number, record in enumerate(records)
    ]


def test_questions_are_asked_of_every_title_with_their_label(tmp_path: Path) -> None:
    task, records = load(tmp_path)
    asked = {(e.retriever_text, e.answers[0], e.gold_ids) for e in draw(task, records)}
    assert asked >= {
        ("Name the capital of Bera!", "Tomund", ("Bera",)),
        ("which city governs Arvo", "Lindel", ("Arvo",)),
        ("What is Bera's highest point?", "Bel", ("Bera",)),
        ("How many metres is the highest point of Bera?", "880 m", ("Bera",)),
        ("Who is chief of state in Emin?", "Tor HALL", ("Emin",)),
    }
    # of two labels with the answer, that counts which has more words of the question
    assert ("Who heads the government of Coro?", "Ada VOL", ("Coro",)) in asked
    assert not any("heads" in question and "Emin" in gold for question, _, gold in asked)


def test_reader_reads_the_question_as_a_qa_task_would_ask_it(tmp_path: Path) -> None:
    task, records = load(tmp_path, QUESTIONS[:1])
    assert {(e.query_text, e.target_text) for e in draw(task, records)} == {
        (f"question: Name the capital of {t}! answer: <extra_id_0>", f"<extra_id_0> {city}")
        for t, city in (("Arvo", "Lindel"), ("Bera", "Tomund"))
    }


def test_a_value_of_another_form_is_not_asked_for(tmp_path: Path) -> None:
    _, records = load(tmp_path, QUESTIONS[5:])
    assert [record.source.title for record in records] == ["Coro", "Emin"]


def test_an_exchanged_value_has_the_form_asked_for(tmp_path: Path) -> None:
    task, records = load(tmp_path, QUESTIONS[5:], given_passages=1, exchange=1.0)
    assert {e.answers[0] for e in draw(task, records)} == {"Ada VOL", "Tor HALL"}


def test_every_fact_with_a_question_is_a_record(tmp_path: Path) -> None:
    _, records = load(tmp_path)
    asked = [(record.source.title, record.fact and record.fact.label) for record in records]
    assert asked[:4] == [
        (title, label) for title in ("Arvo", "Bera") for label in ("Capital name", "Highest point")
    ]


def test_noise_rewords_the_question_and_leaves_title_and_answer(tmp_path: Path) -> None:
    task, records = load(tmp_path, QUESTIONS[:2], noise=1.0)
    examples = draw(task, records)
    assert len({example.retriever_text for example in examples}) > 20
    for example in examples:
        [title] = example.gold_ids
        assert title in example.retriever_text
        assert example.query_text == f"question: {example.retriever_text} answer: <extra_id_0>"
        assert example.answers == ({"Arvo": "Lindel", "Bera": "Tomund"}[title],)


def test_the_share_of_questions_holds(tmp_path: Path) -> None:
    task, records = load(tmp_path, QUESTIONS[:1], question_share=0.5)
    examples = draw(task, records, 200)
    asked = sum(example.retriever_text.startswith("Name the capital") for example in examples)
    assert 0.4 < asked / len(examples) < 0.6
    assert any(example.retriever_text == "Arvo Capital time" for example in examples)


def test_exchanged_values_answer_the_question(tmp_path: Path) -> None:
    task, records = load(tmp_path, QUESTIONS[:2], given_passages=1, exchange=1.0)
    answers = set()
    for example in draw(task, records):
        [given] = example.given_passages or ()
        assert given["title"] in example.query_text
        found = re.search(r"Capital: name: (.*); time", given["text"])
        assert found and found[1] == example.answers[0]
        answers.add(found[1])
    assert len(answers) > 5


@pytest.mark.parametrize(
    ("pattern", "value", "answer"),
    [
        (Pattern("", ""), "1,050 m", "1,050 m"),
        (Pattern("", "", right=frozenset({"#", "m"})), "Mount Ara 1,050 m", "Mount Ara"),
        (Pattern("", "", right=frozenset({"#", "m"})), "Mount Ara", None),
        (Pattern("", "", right=frozenset({"#", "m"})), "1,050 m", None),
        (Pattern("", "", left=frozenset({"#", "million"})), "441,000 BERN", "BERN"),
        (Pattern("", "", measure=("#", "m")), "Mount Ara 1,050 m", "1,050 m"),
        (Pattern("", "", measure=("#", "m")), "Mount Ara", None),
        (Pattern("", ""), '"Old Song"', "Old Song"),
    ],
)
def test_the_answer_is_a_part_of_the_value(
    pattern: Pattern, value: str, answer: str | None
) -> None:
    assert pattern.answer(value) == answer


@pytest.mark.parametrize(
    "question",
    [
        ("Name the capital of Peru!", ["Lindel"], "Arvo"),  # another title
        ("Name the capital of Arvo!", ["Lima"], "Arvo"),  # no value of the passage
        ("How high is Arvo?", ["1,050"], "Arvo"),  # part of a value whose label has none of it
        ("Name the capital of Arvo!", ["Lindel"], "Zuri"),  # no passage of the file
    ],
)
def test_questions_that_cannot_be_asked_of_others_are_refused(
    tmp_path: Path, question: tuple[str, list[str], str]
) -> None:
    with pytest.raises(UserError, match=r"questions.jsonl: no question can be asked of other"):
        load(tmp_path, [question])


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"questions.jsonl:2: field 'question' is empty"):
        load(tmp_path, [QUESTIONS[0], (" ", ["x"], "Arvo")])
