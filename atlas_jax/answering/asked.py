"""Questions as they are asked, and the examples that they become."""

import dataclasses
from collections.abc import Mapping, Sequence

from atlas_jax.answering.run import AnswerRun
from atlas_jax.core.errors import UserError
from atlas_jax.index.passages import PassageStore
from atlas_jax.tasks.base import AsksChoices, AsksTyped, Example


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question with what it asks for on its own; `Atlas.ask` explains the fields."""

    text: str
    k: int = 0
    exclude: Sequence[str] = ()
    replace: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: Sequence[str] = ()


def examples_of(
    told: AnswerRun, asked: Sequence[Asked], store: PassageStore | None
) -> list[Example]:
    """The examples of these questions.

    Args:
      store: the passages that are searched; None = nothing is.

    Raises:
      UserError: an empty question, an id that the store has not, an empty text for a passage,
        choices that are none, or a task whose questions cannot be typed.
    """
    task = check_typed(told)
    return [
        _example(task, one, store, f"question {number} of {len(asked)}" if len(asked) > 1 else "")
        for number, one in enumerate(asked, start=1)
    ]


def _example(task: AsksTyped, asked: Asked, store: PassageStore | None, where: str) -> Example:
    question = asked.text.strip()
    if not question:
        raise UserError(f"{where or 'the question'} is empty; type what you want to know")
    for argument, ids in (("exclude", asked.exclude), ("replace", asked.replace)):
        for one in ids:
            if store is None or store.find(one) is None:
                raise UserError(f"{argument}: no passage of the corpus has the id {one!r}")
    example = _with_choices(task, question, asked.choices)
    edited = []
    for passage_id, text in asked.replace.items():
        if passage_id in asked.exclude:
            raise UserError(f"passage {passage_id!r} is in both exclude and replace; choose one")
        if not text.strip():
            raise UserError(f"replace: the text of passage {passage_id!r} is empty; exclude it")
        assert store is not None  # found above
        edited.append({**store.passage(store.row_of(passage_id)), "text": text})
    return dataclasses.replace(
        example,
        excluded_ids=tuple(dict.fromkeys((*example.excluded_ids, *asked.exclude))),
        k=asked.k,
        edited=tuple(edited),
    )


def _with_choices(task: AsksTyped, question: str, choices: Sequence[str]) -> Example:
    if not choices:
        return task.typed(question)
    if not isinstance(task, AsksChoices):
        name = getattr(task, "name", type(task).__name__)
        raise UserError(f"choices: task {name!r} takes none; ask without them, or use task 'qa'")
    if len(set(choices)) < max(2, len(choices)) or not all(one.strip() for one in choices):
        raise UserError("choices: give two or more different texts that are not empty")
    return task.typed_with(question, choices)


def check_typed(told: AnswerRun) -> AsksTyped:
    """Return the task if a person can type its questions.

    Raises:
      UserError: its questions need more than a line of text, or come with their passages.
    """
    task = told.task
    if told.evaluation.passages == "file":
        raise UserError(
            "EvalConfig.passages = 'file': a typed question brings no passages; "
            "use 'index', or 'none' for closed book"
        )
    if not isinstance(task, AsksTyped):
        raise UserError(
            f"EvalConfig.task = {task.name!r} is not for typed questions: they need more than a "
            "line of text (a task of your own takes one with a method `typed`)"
        )
    return task
