"""Task `fever`: is a claim supported or refuted by what is known (arXiv 1803.05355)?"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from atlas_jax.tasks.labelled import LabelledTask


@dataclasses.dataclass(frozen=True)
class FeverTask(LabelledTask):
    """Lines `{claim, label, id?, gold?, negatives?, passages?}`; the words are those of Atlas.

    Its `compare` is 'literal' in Atlas; `predicted_label` is what FEVER's own script wants.
    """

    query_format: str = "question: {claim} answer: <extra_id_0>"
    retriever_format: str = "{claim}"

    name: ClassVar[str] = "fever"
    asks: ClassVar[tuple[str, ...]] = ("claim",)
    label: ClassVar[str] = "label"
    words: ClassVar[Mapping[str | bool, str]] = {
        "SUPPORTS": "true", "REFUTES": "false", "NOT ENOUGH INFO": "maybe",
    }  # fmt: skip
