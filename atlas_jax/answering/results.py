"""What a loaded Atlas gives: answers, and the passages that they were read from."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from atlas_jax.answering.evaluator import Found


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage that was found for a question.

    Attributes:
      score: inner product of the question's and the passage's embedding.
      attention, alone, left_out: what the passage contributed to the answer, if explanations
        were asked for and it was read; see `answers.Evidence`.
    """

    id: str
    title: str
    section: str
    text: str
    score: float
    attention: float | None = None
    alone: float | None = None
    left_out: float | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question and the passages it was read from.

    Attributes:
      question: as it was asked.
      text: the answer.
      log_probability: of the answer's tokens. If the task has choices, of this choice among
        all of them.
      passages: those that were read, best first; none for a closed book.
    """

    question: str
    text: str
    log_probability: float
    passages: tuple[Passage, ...]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A file of questions, answered and scored.

    Attributes:
      scores: of the task, each from 0 to 1.
      found: passages and answer of each question, in the order of the file.
    """

    scores: dict[str, float]
    found: list[Found]

    @property
    def answers(self) -> list[Answer]:
        """The answers as `Atlas.ask` returns them; without text if nothing was read."""
        return [answer_of(one.example.query_text, one) for one in self.found]


def answer_of(question: str, found: Found) -> Answer:
    """The answer to a question as it was asked."""
    score = found.log_probability if found.log_probability is not None else math.nan
    return Answer(question, found.answer or "", score, passages_of(found))


def passages_of(found: Found) -> tuple[Passage, ...]:
    """The passages that were found for a question, best first."""
    return tuple(_passage(one) for one in found.passages)


def _passage(raw: Mapping[str, Any]) -> Passage:
    names: Iterator[str] = (field.name for field in dataclasses.fields(Passage))
    return Passage(**{name: raw[name] for name in names if name in raw})
