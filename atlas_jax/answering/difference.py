"""What a change of the passages did to the answers, and which answers did not follow it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from atlas_jax.answering.results import Answer, Passage
from atlas_jax.tasks.metrics import normalize_answer

Verdict = Literal["changed", "not followed", "unmoved"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One question, answered from the passages as they were and as they are.

    Attributes:
      question: as the answers have it.
      before, after: the texts of the answers.
      verdict: "changed", if the answer is another one up to case, articles and punctuation. "not
        followed", if the reader read a passage that is new or has a new text, and kept its answer:
        it may know the answer by heart. "unmoved", if it read nothing new and kept its answer.
      new: passages read afterwards that were not read before, or not with this text.
      gone: passages read before that are not read afterwards, or not with this text.
    """

    question: str
    before: str
    after: str
    verdict: Verdict
    new: tuple[Passage, ...]
    gone: tuple[Passage, ...]

    def as_record(self) -> dict[str, Any]:
        """As a line of jsonl; passages by their ids."""
        ids = {name: [one.id for one in getattr(self, name)] for name in ("new", "gone")}
        return {**dataclasses.asdict(self), **ids}


def differences(before: Sequence[Answer], after: Sequence[Answer]) -> list[Difference]:
    """Compare the answers to the same questions.

    Raises:
      ValueError: they are answers to other questions.
    """
    if [one.question for one in before] != [one.question for one in after]:
        raise ValueError("the answers before and after are to different questions")
    return [_difference(old, new) for old, new in zip(before, after, strict=True)]


def _difference(old: Answer, new: Answer) -> Difference:
    was_read = {(one.id, one.text) for one in old.passages}
    is_read = {(one.id, one.text) for one in new.passages}
    arrived = tuple(one for one in new.passages if (one.id, one.text) not in was_read)
    left = tuple(one for one in old.passages if (one.id, one.text) not in is_read)
    verdict: Verdict = "unmoved"
    if normalize_answer(old.text) != normalize_answer(new.text):
        verdict = "changed"
    elif arrived:
        verdict = "not followed"
    return Difference(new.question, old.text, new.text, verdict, arrived, left)


def table(found: Sequence[Difference]) -> RenderableType:
    """Questions whose answer changed or should have; and the number of each kind."""
    shown = Table("question", "before", "after", "verdict", "new passages", "gone", show_lines=True)
    for one in sorted(found, key=lambda each: each.verdict):
        if one.verdict != "unmoved":
            ids = (" ".join(each.id for each in some) for some in (one.new, one.gone))
            cells = (one.question, one.before, one.after, one.verdict, *ids)
            shown.add_row(*(Text(cell) for cell in cells))
    counts = ", ".join(
        f"{sum(one.verdict == verdict for one in found)} {verdict}" for verdict in get_args(Verdict)
    )
    told = Text(f"{len(found)} questions: {counts}")
    return Group(shown, told) if shown.row_count else told
