import pytest

from atlas_jax.demo.results import best_read, samples, scores


def _row(number, prediction, answers, gold, *found):
    passages = [
        {"id": i, "title": "T", "section": "S", "text": text, "score": 9.0 - n}
        for n, (i, text) in enumerate(found)
    ]
    row = {"id": str(number), "question": f"q{number}?", "answers": answers, "gold": gold}
    return {**row, "passages": passages} | (
        {} if prediction is None else {"prediction": prediction}
    )


FOUND = (("a", "Capital: Rome."), ("b", "Capital: Lima."), ("c", "Capital: Oslo."))
ROWS = [
    _row(1, "Lima", ["Lima"], ["b"], *FOUND),
    _row(2, "the oslo", ["Bergen", "Oslo"], ["z"], *FOUND),
    _row(3, "New Paris", ["Paris"], ["a"], *FOUND),
    _row(4, "", ["Kyiv"], ["c"], *FOUND),
]


def test_scores_are_percentages_by_the_tasks_measures():
    found = scores(ROWS, 4)
    assert found["exact_match k=4"] == 50.0
    assert found["f1 k=4"] == pytest.approx(100 * (1 + 1 + 2 / 3) / 4)
    assert (found["recall@1"], found["recall@5"]) == (25.0, 75.0)


def test_retrieval_alone_has_no_answer_scores_and_closed_book_no_recall():
    assert set(scores([_row(1, None, ["x"], ["a"], *FOUND)])) == {
        "recall@1", "recall@5", "recall@20",
    }  # fmt: skip
    assert set(scores([_row(1, "x", ["x"], ["a"])])) == {
        "exact_match k=0", "f1 k=0",
    }  # fmt: skip


def test_the_best_number_of_passages_is_the_smallest_with_the_best_exact_match():
    found = {"exact_match k=1": 30.0, "exact_match k=4": 40.0, "exact_match k=8": 40.0}
    assert best_read(found, (1, 4, 8)) == 4


def test_samples_name_the_passage_that_was_read_and_holds_the_answer():
    drawn = {s.question: s for s in samples(ROWS, count=4, read=2)}
    assert (drawn["q1?"].rank, drawn["q1?"].score, drawn["q1?"].correct) == (2, 8.0, True)
    assert drawn["q2?"].rank == 1  # the third passage holds it, but was not read
    assert drawn["q4?"].passage == "Capital: Rome." and not drawn["q4?"].correct


def test_the_same_samples_are_drawn_whatever_the_order():
    assert samples(ROWS, 2, 2) == samples(ROWS[::-1], 2, 2)
    assert len(samples(ROWS, 9, 2)) == 4
    drawn = {tuple(s.question for s in samples(ROWS, 2, 2, seed)) for seed in range(5)}
    assert len(drawn) > 1
