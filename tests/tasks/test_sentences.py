"""Task `sentences`: what is asked for stands in the passage, and what is hidden tells of it."""

import re

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import unmarked
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.sentences import SentencesTask

PROSE = (
    "The Eiffel Tower is in Paris. Gustave Eiffel began the tower on 28 January 1887 with 300 "
    "workers. It opened in May 1889, and Paris has kept it."
)
FACTS = "Capital: name: Oranjestad; geographic coordinates: 12 31 N. Coastline: 68.5 km."


def examples(tmp_path, text, count=200, **settings):
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, [{"id": "p0", "title": "Some title", "text": text}])
    task = SentencesTask(min_words=4, **settings)
    [record] = task.load(path)
    return [task.example(record, np.random.default_rng(seed)) for seed in range(count)]


def test_a_sentence_with_its_gap_filled_is_the_text_again(tmp_path):
    made = examples(tmp_path, PROSE, as_question=0.0, title=0.0, query_words=40, hide=0.0)
    for example in made:
        query, target = unmarked(example.query_text), unmarked(example.target_text)
        answer = target.removeprefix("<extra_id_0> ")
        assert (answer,) == example.answers
        filled = re.sub(r"\s", "", query.replace("<extra_id_0>", answer))
        assert filled in re.sub(r"\s", "", PROSE)
        assert "extra_id" not in example.retriever_text
    assert {example.answers[0] for example in made} == {
        "Eiffel Tower", "Paris", "Gustave Eiffel", "28 January 1887", "300", "300 workers",
        "May 1889", "tower",
    }  # fmt: skip


def test_a_question_begins_with_a_word_that_fits_what_is_missing(tmp_path):
    made = examples(tmp_path, PROSE, as_question=1.0, phrases=0.0, drop=0.0, title=0.0, hide=0.0)
    for example in made:
        query = example.query_text
        assert query.startswith("question: ") and query.endswith(" answer: <extra_id_0>")
        if example.answers == ("28 January 1887",):
            asked = query.removeprefix("question: ")
            assert asked.startswith(("when", "what year", "in what", "on what", "Gustave"))
            assert "Gustave Eiffel began the tower" in query and "January" not in query
    assert {"28 January 1887", "May 1889", "Gustave Eiffel"} <= {e.answers[0] for e in made}


def test_a_fact_is_asked_for_by_its_label_and_title(tmp_path):
    made = examples(tmp_path, FACTS, facts=1.0, drop=0.0)
    assert {e.answers[0] for e in made} == {"Oranjestad", "12 31 N", "68.5 km"}
    for example in made:
        assert "Some title" in example.query_text
        if example.answers == ("Oranjestad",):
            assert {"capital", "name"} <= set(re.findall(r"\w+", example.query_text))
        assert example.hidden is None


def test_only_a_sentence_whose_answer_stands_elsewhere_is_hidden(tmp_path):
    made = examples(tmp_path, PROSE, hide=1.0, count=400)
    hidden = [example for example in made if example.hidden]
    assert hidden and all(example.may_hide for example in made)
    for example in hidden:
        cut = example.hidden
        assert cut.passage_id == "p0"
        rest = PROSE[: cut.start] + PROSE[cut.end :]
        assert example.answers[0] in PROSE[cut.start : cut.end]
        assert example.answers[0] in rest
    assert not any(e.hidden for e in examples(tmp_path, PROSE, hide=0.0))


MIXED = (
    "In March 1982 the U.S. signed it on the 19th day, and Mary's brother Jean-Luc Picard, the "
    "captain of a French supply ship in the harbour, left on 3 June 1983."
)


def test_names_numbers_and_dates_are_asked_for_whole(tmp_path):
    made = examples(tmp_path, MIXED, 300, phrases=0.0, title=0.0)
    # neither the 19 of 19th nor June of 3 June 1983
    assert {e.answers[0] for e in made} == {
        "March 1982", "U.S.", "Mary", "Jean-Luc Picard", "French", "3 June 1983",
    }  # fmt: skip


def test_a_phrase_ends_where_a_small_word_or_a_stop_stands(tmp_path):
    made = examples(tmp_path, MIXED, 300, phrases=1.0, title=0.0)
    assert {e.answers[0] for e in made} == {
        "March 1982", "U.S.", "19th day", "captain", "French supply ship", "harbour", "3 June 1983",
    }  # fmt: skip


def test_a_fact_whose_label_or_value_says_nothing_is_not_asked_for(tmp_path):
    text = "Capital: name: Oranjestad. Area: note: 180 sq km. Election: every five years and."
    made = examples(tmp_path, text, facts=1.0, drop=0.0)
    assert {e.answers[0] for e in made} == {"Oranjestad"}


def test_a_fact_with_a_number_or_a_date_is_asked_for_as_such(tmp_path):
    text = "Area: total: 180 sq km. Independence: since: 1 July 1962. Capital: name: Oranjestad."
    made = examples(tmp_path, text, facts=1.0, drop=0.0, as_question=1.0)
    asked = {
        answer: {e.query_text for e in made if e.answers == (answer,)}
        for answer in ("180 sq km", "1 July 1962", "Oranjestad")
    }
    starts = {
        answer: {word for word in ("when", "how many", "who", "name")
                 if any(q.startswith(f"question: {word} ") for q in asked[answer])}
        for answer in asked
    }  # fmt: skip
    assert starts == {
        "180 sq km": {"how many"}, "1 July 1962": {"when"}, "Oranjestad": {"who", "name"},
    }  # fmt: skip


def test_what_stands_beyond_the_first_words_is_not_asked_for(tmp_path):
    made = examples(tmp_path, PROSE, within_words=6)
    assert all(example.answers[0] in "The Eiffel Tower is in Paris" for example in made)


def test_equal_generators_give_equal_examples(tmp_path):
    assert examples(tmp_path, PROSE, 20) == examples(tmp_path, PROSE, 20)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hide": 1.5}, "SentencesTask.hide"),
        ({"query_words": 3}, "SentencesTask.query_words"),
        ({"query_format": "{text}"}, "SentencesTask.query_format"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        SentencesTask(**settings)


def test_passages_that_the_file_gives_come_with_the_example(tmp_path):
    path = tmp_path / "passages.jsonl"
    own = {"id": "p0", "title": "Some title", "text": PROSE}
    other = {"id": "p1", "title": "Other title", "text": FACTS}
    write_jsonl(path, [own | {"passages": [own, other]}, other])
    task = SentencesTask(min_words=4)
    given, plain = (task.example(record).given_passages for record in task.load(path))
    assert given is not None and plain is None
    assert [(p["id"], p["title"], p["text"]) for p in given] == [
        ("p0", "Some title", PROSE), ("p1", "Other title", FACTS),
    ]  # fmt: skip
