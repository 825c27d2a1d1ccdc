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


# As Google's rouge_score 0.1.2 gives them (F-measure, no stemming).
@pytest.mark.parametrize(
    ("prediction", "answer", "rouge1", "rouge2", "rouge_l"),
    [
        ("the cat sat on the mat", "the cat lay on the mat", 0.833333, 0.6, 0.833333),
        ("", "x", 0, 0, 0),
        ("x", "", 0, 0, 0),
        ("São Tomé", "sao tome", 0, 0, 0),
        ("U.S. 1,234 km", "US 1234 km", 0.25, 0, 0.25),
        ("a b c d", "d c b a", 1, 0, 0.25),
        ("one two two three", "two two four", 0.571429, 0.4, 0.571429),
        ("!!!", "???", 0, 0, 0),
        ("Same text.", "same TEXT", 1, 1, 1),
        ("New-York's city", "new york s city", 1, 1, 1),
    ],
)
def test_rouge_is_that_of_the_published_script(prediction, answer, rouge1, rouge2, rouge_l):
    found = [metrics.rouge(name, prediction, answer) for name in metrics.ROUGE]
    assert found == pytest.approx([rouge1, rouge2, rouge_l], abs=1e-6)
