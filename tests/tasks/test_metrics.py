"""Scores of answers and passages, against values worked out by hand."""

import pytest

from atlas_jax.tasks import metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("14,500 km", "14500 km"),
        ("São Tomé", "são tomé"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalisation_is_that_of_squad(text, normal):
    assert metrics.normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1"),
    [
        ("The Nile.", "nile", 1, 1),
        ("river Nile", "Nile", 0, 2 / 3),
        ("a b b", "b b c", 0, 4 / 5),  # two words against three: "a" is an article
        ("Paris", "London", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "London", 0, 0),
        ("London", "", 0, 0),
    ],
)
def test_exact_match_and_f1(prediction, answer, em, f1):
    assert metrics.exact_match(prediction, answer) == em
    assert metrics.f1(prediction, answer) == pytest.approx(f1)


def test_the_best_answer_counts():
    assert metrics.best_over_answers(metrics.f1, "the Nile", ["Amazon", "Nile"]) == 1
    with pytest.raises(ValueError, match="empty"):
        metrics.best_over_answers(metrics.f1, "the Nile", [])


def test_recall_looks_at_the_first_k():
    found = ["p3", "p1", "p2"]
    assert [metrics.recall_at_k(found, ["p1", "p9"], k) for k in (1, 2, 3)] == [0, 1, 1]
    assert metrics.recall_at_k(found, [], 3) == 0
    assert metrics.recall_at_k([], ["p1"], 3) == 0


def test_an_answer_is_found_word_for_word():
    passage = "Coastline: 14,500 km; the U.S. has 15 territories."
    assert metrics.answer_in_passage(passage, ["14500 km"])
    assert metrics.answer_in_passage(passage, ["nothing", "US"])
    assert not metrics.answer_in_passage(passage, ["5"])
    assert not metrics.answer_in_passage(passage, ["4,500 km"])
    assert not metrics.answer_in_passage(passage, ["the", "", "..."])
    passages = ["none here", passage]
    assert [metrics.answer_recall_at_k(passages, ["15"], k) for k in (1, 2)] == [0, 1]
