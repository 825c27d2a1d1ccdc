"""What the explorer offers to somebody who does not know the corpus."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from atlas_jax.core.jsonl import read_jsonl
from atlas_jax.index.passages import PassageStore
from atlas_jax.serving.replies import stored_reply
from atlas_jax.serving.schemas import ExamplesReply

T = TypeVar("T")

_QUESTIONS, _PASSAGES = 8, 6


class Examples:
    """Questions of a file, and passages of the corpus, both spread evenly."""

    def __init__(self, file: str) -> None:
        """Read the questions.

        Raises:
          UserError: the file is at fault.
        """
        rows = [row for _, row in read_jsonl(file)] if file else []
        asked = [row["question"] for row in rows if isinstance(row.get("question"), str)]
        self._questions = _spread(asked, _QUESTIONS)

    def reply(self, store: PassageStore | None) -> ExamplesReply:
        """The questions, and some passages of this store."""
        rows = _spread(range(store.count), _PASSAGES) if store else []
        passages = [stored_reply(store.passage(row)) for row in rows] if store else []
        return ExamplesReply(questions=self._questions, passages=passages)


def _spread(values: Sequence[T], most: int) -> list[T]:
    at = np.linspace(0, len(values) - 1, min(len(values), most)).astype(int)
    return [values[place] for place in dict.fromkeys(at.tolist())]
