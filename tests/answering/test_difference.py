"""Verdicts about answers before and after a change of the passages."""

import pytest

from atlas_jax.answering.difference import differences
from atlas_jax.answering.results import Answer, Passage


def answer(text: str, *passages: tuple[str, str], question: str = "Who leads it?") -> Answer:
    found = tuple(Passage(one, "", "", body, 0.0) for one, body in passages)
    return Answer(question, text, -1.0, found)


OLD, NEW = ("p1", "Ann leads it."), ("p1", "Bo leads it.")
OTHER = ("p2", "It is large.")


def test_an_answer_changes_follows_not_or_stays_unmoved() -> None:
    before = [answer("Ann", OLD, OTHER)] * 4
    after = [
        answer("Bo", NEW, OTHER),
        answer("ann.", NEW, OTHER),  # read the new text, kept the answer
        answer("The Ann", OLD, OTHER),
        answer("Bo", OTHER),  # the passage was deleted
    ]
    found = differences(before, after)
    verdicts = [one.verdict for one in found]
    assert verdicts == ["changed", "not followed", "unmoved", "changed"]
    assert [one.text for one in found[0].new] == [NEW[1]] and found[0].as_record()["gone"] == ["p1"]
    assert found[3].as_record() == {
        "question": "Who leads it?", "before": "Ann", "after": "Bo", "verdict": "changed",
        "new": [], "gone": ["p1"],
    }  # fmt: skip


def test_answers_to_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different questions"):
        differences([answer("a")], [answer("a", question="Who else?")])
