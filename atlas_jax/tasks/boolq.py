"""Task `boolq`: questions whose answer is yes or no (arXiv 1905.10044)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from atlas_jax.tasks.labelled import LabelledTask


@dataclasses.dataclass(frozen=True)
class BoolQTask(LabelledTask):
    """Lines `{question, answer, id?, gold?, negatives?, passages?}`; the passages are retrieved."""

    query_format: str = "question: {question}? answer: <extra_id_0>"
    retriever_format: str = "{question}"

    name: ClassVar[str] = "boolq"
    asks: ClassVar[tuple[str, ...]] = ("question",)
    label: ClassVar[str] = "answer"
    words: ClassVar[Mapping[str | bool, str]] = {True: "yes", False: "no"}
