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
from atlas_jax.tasks.facts import Fact

PASSAGES = {
    "Arvo": "Capital: name: Lindel; time: UTC+1. Highest point: Mount Ara 1,050 m.",
    "Bera": "Capital: name: Tomund; time: UTC+2. Highest point: Bel 880 m.",
    "Coro": "Chief of state: President Ada VOL. Head of government: President Ada VOL.",
    "Dela": "Chief of state: King Otto. Head of government: Premier Ina ESK.",
    "Emin": "Chief of state: President Tor HALL. Population: 5,000.",
}
QUESTIONS = (
    ("Name the capital of Arvo!", ["lindel"]),
    ("which city governs Bera", ["The Tomund"]),
    ("What is Arvo's highest point?", ["Mount Ara"]),
    ("How many metres is the highest point of Arvo?", ["1,050 m"]),
    ("Who heads the government of Coro?", ["Ada Vol"]),
    ("Who is chief of state in Coro?", ["Ada Vol", "Vol"]),
)


def load(
    tmp_path: Path, questions: Any = QUESTIONS, **settings: Any
) -> tuple[ClozeTask, list[ClozeRecord]]:
    passages, asked = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(passages, ({"id": t, "title": t, "text": x} for t, x in PASSAGES.items()))
    write_jsonl(asked, ({"question": q, "answers": a} for q, a in questions))
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
        (Pattern("", "", measure=("#", "A")), "Day of Rest, 5 May (1921)", "5 May"),
        (Pattern("", ""), '"Old Song"', "Old Song"),
    ],
)
def test_the_answer_is_a_part_of_the_value(
    pattern: Pattern, value: str, answer: str | None
) -> None:
    assert pattern.answer(Fact("Label", 0, len(value), len(value)), value) == answer


# --- what one question shows, for all values of its label --------------------------------

AUTHORS = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jo")
STATES = {
    "Arvo": "Chief: President Ada VOL. Colors: red, white. Holiday: Union Day, 5 May (1921).",
    "Bera": "Chief: Prime Minister Bo TAL (since 2001). Colors: blue. Holiday: none.",
    "Coro": "Chief: Prime Minister Ed SUN. Colors: black, red. Holiday: Rest, 11 June (1800).",
    "Dela": "Chief: Prime Minister Ina ESK. Colors: white, gold. Holiday: New Day, 1 July.",
    "Emin": "Chief: Otto. Author: Al Bo and Cy De. Holiday: Day of the King, 30 April (1900).",
    **{name: f"Author: {name} Roe. Colors: grey, pink." for name in AUTHORS},
}  # fmt: skip


def answers(tmp_path: Path, question: str, answer: str, **settings: Any) -> set[str]:
    """What the question's pattern asks for over all of `STATES`."""
    passages, asked = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(passages, ({"id": t, "title": t, "text": x} for t, x in STATES.items()))
    write_jsonl(asked, [{"question": question, "answers": [answer]}])
    task = ClozeTask(question_file=str(asked), **settings)
    return {example.answers[0] for example in draw(task, task.load(passages), 20)}


def test_words_that_many_values_begin_with_are_roles(tmp_path: Path) -> None:
    """Two of three values begin with another role than the one of the question."""
    assert answers(tmp_path, "Chief of Arvo?", "Ada Vol") == {
        "Ada VOL", "Bo TAL", "Ed SUN", "Ina ESK",
    }  # fmt: skip


def test_what_stands_beside_one_answer_alone_is_not_asked_of_others(tmp_path: Path) -> None:
    found = answers(tmp_path, "What author has Emin?", "Cy De")
    assert found == {"Al Bo and Cy De", *(f"{name} Roe" for name in AUTHORS)}


def test_a_list_answers_as_a_whole(tmp_path: Path) -> None:
    assert answers(tmp_path, "Which colors has Arvo?", "Red, white") == {
        "red, white", "blue", "black, red", "white, gold", "grey, pink",
    }  # fmt: skip


def test_a_measure_is_found_behind_the_head(tmp_path: Path) -> None:
    settings = {"given_passages": 1, "exchange": 0.5, "window_words": 2}
    for more in ({}, settings):
        found = answers(tmp_path, "When is Arvo's holiday?", "5 May", **more)
        assert found >= {"5 May", "11 June", "1 July", "30 April"}
        assert all(re.fullmatch(r"\d+ [A-Z]\w+", answer) for answer in found)


def test_a_given_passage_has_the_list_that_is_asked_for(tmp_path: Path) -> None:
    passages, asked = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(passages, ({"id": t, "title": t, "text": x} for t, x in STATES.items()))
    question = {"question": "Which colors has Arvo?", "answers": ["red, white"]}
    write_jsonl(asked, [question])
    task = ClozeTask(question_file=str(asked), given_passages=1, exchange=0.7, window_words=2)
    examples = draw(task, task.load(passages), 20)
    assert len({example.answers[0] for example in examples}) > 10
    for example in examples:
        [given] = example.given_passages or ()
        assert f"Colors: {example.answers[0]}" in given["text"]


def test_the_longest_title_is_asked_about_and_each_of_its_passages_may_answer(
    tmp_path: Path,
) -> None:
    passages, asked = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(
        passages,
        (
            {"id": str(n), "title": title, "text": text}
            for n, (title, text) in enumerate(
                [
                    ("Ara", "Capital: Lindel. Border: Tomund."),
                    ("New Ara", "Area: 9 sq km. Coast: 3 km."),
                    ("New Ara", "Border: Lindel 3 km. Capital: Lindel."),
                    ("Aran", "Capital: Lindel."),
                ]
            )
        ),
    )
    write_jsonl(
        asked, [{"question": "Where does New Ara's parliament sit?", "answers": ["Lindel"]}]
    )
    task = ClozeTask(question_file=str(asked))
    found = {(e.retriever_text, e.gold_ids) for e in draw(task, task.load(passages))}
    assert found == {
        ("Where does Ara's parliament sit?", ("0",)),
        ("Where does New Ara's parliament sit?", ("2",)),
        ("Where does Aran's parliament sit?", ("3",)),
    }


@pytest.mark.parametrize(
    "question",
    [
        ("Name the capital of Peru!", ["Lindel"]),  # no title of the file
        ("Name the capital of Arvonia!", ["Lindel"]),  # a part of a word is no title
        ("Name the capital of Arvo!", ["Lima"]),  # no value of the title's passages
        ("How high is Arvo?", ["1,050"]),  # part of a value whose label has none of it
    ],
)
def test_questions_that_cannot_be_asked_of_others_are_refused(
    tmp_path: Path, question: tuple[str, list[str]]
) -> None:
    with pytest.raises(UserError, match=r"questions.jsonl: no question can be asked of other"):
        load(tmp_path, [question])


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"questions.jsonl:2: field 'question' is empty"):
        load(tmp_path, [QUESTIONS[0], (" ", ["x"])])
