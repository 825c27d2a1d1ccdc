"""Change knowledge without training: change a passage and ask again.

The questions are test questions that the model answered correctly. The passage that it ranked first
must contain the answer word for word. There the answer is replaced by another country's, like in a
newer edition. `atlas-jax index replace` embeds these passages alone; no parameter changes. All of
this module is pure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas_jax.demo.factbook_splits import stable_random
from atlas_jax.demo.report import Swap
from atlas_jax.tasks.metrics import best_over_answers, exact_match, normalize_answer

_CHANGES_MOST = ("temporal", "slow", "static")


@dataclass(frozen=True)
class Candidate:
    """A question whose answer can be swapped, and the changed passage."""

    question: Mapping[str, Any]
    answer: str
    new_value: str
    passage: Mapping[str, str]

    @property
    def row(self) -> dict[str, Any]:
        """The question as a line of a question file; the new value is the accepted answer."""
        return {**self.question, "answers": [self.new_value]}


def replaced(text: str, old: str, new: str) -> str:
    """Replace `old` by `new` wherever it is a whole word, in any case.

    A text without `old` is returned as it is.
    """
    pattern = rf"(?<![\w.])(?<!\d,){re.escape(old)}(?!\w|[.,]\d)"
    return re.sub(pattern, lambda _: new, text, flags=re.IGNORECASE)


def other_value(question: Mapping[str, Any], questions: Sequence[Mapping[str, Any]]) -> str | None:
    """The answer to another question of the same relation, of the same length if possible.

    Questions of one's own have no relation: there a number takes the place of a number, and words
    that of words. None if every other answer is the same.
    """
    accepted = {normalize_answer(answer) for answer in question["answers"]}
    values = sorted(
        {
            other["answers"][0]
            for other in questions
            if _kind(other) == _kind(question)
            and accepted.isdisjoint(normalize_answer(answer) for answer in other["answers"])
        }
    )
    words = len(question["answers"][0].split())
    alike = [value for value in values if len(value.split()) == words] or values
    return stable_random("swap", question["id"]).choice(alike) if alike else None


def _kind(question: Mapping[str, Any]) -> Any:
    return question.get("relation", any(c.isdigit() for c in question["answers"][0]))


def choose(
    predictions: Sequence[Mapping[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    passages: Mapping[str, Mapping[str, str]],
    count: int,
) -> list[Candidate]:
    """Return at most `count` candidates: at most one for each relation and for each passage.

    Relations that change fastest come first; within them, passages found with the highest scores.

    Args:
      predictions: `{id, prediction, passages: [{id, score}]}`, passages best first.
      questions: the test set, `{id, question, answers, relation, group, gold}`.
      passages: by id, `{id, title, section, text}`.
    """
    by_id = {question["id"]: question for question in questions}
    possible = []
    for prediction in predictions:
        question, found = by_id[prediction["id"]], prediction["passages"]
        answer = prediction["prediction"] or ""
        right = answer and best_over_answers(exact_match, answer, question["answers"])
        if right and found and found[0]["id"] in question["gold"]:
            group = question.get("group", _CHANGES_MOST[-1])
            order = (_CHANGES_MOST.index(group), -found[0]["score"], question["id"])
            possible.append((order, question, answer, passages[found[0]["id"]]))
    chosen: list[Candidate] = []
    used: set[str] = set()
    for _, question, answer, passage in sorted(possible, key=lambda item: item[0]):
        new_value = other_value(question, questions)
        once = {passage["id"], question.get("relation", question["id"])}
        if len(chosen) == count or not used.isdisjoint(once):
            continue
        if new_value is None or normalize_answer(new_value) in normalize_answer(passage["text"]):
            continue
        text = replaced(passage["text"], answer, new_value)
        if text != passage["text"]:
            used |= once
            chosen.append(Candidate(question, answer, new_value, {**passage, "text": text}))
    return chosen


def judge(candidates: Sequence[Candidate], answers: Mapping[str, str]) -> list[Swap]:
    """Compare the answers before and after; `answers` are the new ones by question id."""
    return [
        Swap(
            question=candidate.question["question"],
            title=candidate.passage["title"],
            old_value=candidate.answer,
            new_value=candidate.new_value,
            answer_before=candidate.answer,
            answer_after=answers[candidate.question["id"]],
            follows=exact_match(answers[candidate.question["id"]], candidate.new_value) == 1.0,
        )
        for candidate in candidates
    ]
