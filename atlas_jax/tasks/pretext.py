"""Shared by the tasks that are made from the passages themselves."""

from pathlib import Path

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.core.layouts import PASSAGES
from atlas_jax.tasks.base import Record
from atlas_jax.tasks.file_records import FileRecords, open_records


def load_passages(
    path: str | Path, min_words: int, binding: str, rows: RowsConfig = STRICT
) -> FileRecords:
    """Records `{id, title?, section?, text}` of at least `min_words` words; the file keeps them.

    Raises:
      UserError: names file, line and field; or no passage is long enough (`binding` names the
        setting of the length).
    """
    required: FieldTypes = {"id": (str, int), "text": str}
    optional: FieldTypes = {"title": str, "section": str}

    def is_long(record: Record) -> bool:
        return len(record.fields["text"].split()) >= min_words

    records = open_records(path, required, optional, ["id", "text"], PASSAGES, is_long, rows)
    if not records:
        raise UserError(f"{path}: no passage has {min_words} words ({binding})")
    return records


def check_range(binding: str, value: float, fits: bool, expected: str) -> None:
    """Raise a UserError that names the binding unless the value fits."""
    if not fits:
        raise UserError(f"{binding} = {value!r}: expected {expected}")
