"""What runs found of the recall of their approximate searches, noted beside the saved index.

recall.json      a list of `RecallNote`, one for each way of searching and each k, the newest
"""

import json
import os
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.objects import Objects

_FILE = "recall.json"
Share = Annotated[float, Meta(ge=0, le=1)]


class RecallNote(TypedDict):
    """The recall of one way of searching.

    ``search`` are the settings, ``encoder_hash`` is of the embeddings that were searched. ``low``
    and ``high`` bound ``recall`` with 95 % confidence, from ``questions`` that were searched
    exactly, too. ``passages_version`` is the store's, ``time`` is in UTC.
    """

    search: dict[str, Any]
    encoder_hash: str
    k: Annotated[int, Meta(ge=1)]
    recall: Share
    low: Share
    high: Share
    questions: Annotated[int, Meta(ge=1)]
    passages_version: bounds.Count
    time: str


def recall_notes(directory: str | os.PathLike[str]) -> list[RecallNote]:
    """The notes of a saved index, newest last; [] without any.

    Raises:
      UserError: the file is damaged.
    """
    objects = Objects(directory)
    if not objects.has(_FILE):
        return []
    raw, where = objects.read(_FILE), objects.at(_FILE)
    found: list[RecallNote] = strict_json.parse_as(raw, list[RecallNote], where)
    return found


def note_recall(directory: str | os.PathLike[str], note: RecallNote) -> None:
    """Note it in place of an earlier one of the same search and k.

    Raises:
      OSError: the index cannot be written.
      UserError: its notes are damaged.
    """
    way = note["search"], note["k"]
    kept = [one for one in recall_notes(directory) if (one["search"], one["k"]) != way]
    Objects(directory).write(_FILE, (json.dumps([*kept, note], indent=2) + "\n").encode("utf-8"))


def line_of(note: RecallNote) -> str:
    """A note as a line of text."""
    search = ", ".join(
        f"{value}" if name == "searcher" else f"{name} {value}"
        for name, value in note["search"].items()
    )
    return (
        f"recall@{note['k']} of {search}: {note['recall']:.3f} ({note['low']:.3f} to "
        f"{note['high']:.3f} with 95 % confidence, {note['questions']} questions, version "
        f"{note['passages_version']}, {note['time'][:19]}Z)"
    )
