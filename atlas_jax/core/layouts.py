"""The layouts of data files: this project's own and those of well-known collections.

A file's layout is recognised by its suffix and by the fields of its first record. Every layout is
converted to this project's fields, so the rest of the code knows only one layout. To read another
layout, add a row to `PASSAGES` or `QUESTIONS`.
"""

import ast
import csv
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import (
    STRICT,
    BrokenRows,
    FieldTypes,
    JsonObject,
    Part,
    RowsConfig,
    check_fields,
    read_jsonl,
    text_lines,
)
from atlas_jax.core.paths import as_path

# A passage as a store has it: the fields id, title, section and text.
PassageFields = dict[str, str]

_LONGEST_VALUE = 1 << 24  # characters in a table's value; by default csv stops at 2**17

_ID: FieldTypes = {"id": (str, int)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of passages or questions.

    Attributes:
      name: for people.
      told_by: types of the fields by which the layout is recognised; every record has them.
      optional: types of fields that may be absent.
      called: our field -> the layout's field, if they differ. A record that has one of ours is
        not of this layout.
      table: whether the file is a table of tab-separated values, not jsonl.
      columns: names of the table's columns; () = the first line names them.
      repeats: whether a passage may occur several times with the same id; it is read once.
      settle: further changes; a function of the renamed record and its place.
    """

    name: str
    told_by: FieldTypes
    optional: FieldTypes = dataclasses.field(default_factory=dict)
    called: Mapping[str, str] = dataclasses.field(default_factory=dict)
    table: bool = False
    columns: tuple[str, ...] = ()
    repeats: bool = False
    settle: Callable[[JsonObject, str], JsonObject] | None = None

    def fits(self, raw: Mapping[str, Any]) -> bool:
        """Whether a record has the fields by which this layout is recognised."""
        has_ours = any(own in raw for own in self.called)
        return not has_ours and all(
            name in raw and isinstance(raw[name], kind) for name, kind in self.told_by.items()
        )

    def convert(self, raw: Mapping[str, Any], where: str) -> JsonObject:
        """The record with our fields; unknown fields stay as they are.

        Raises:
          UserError: names the field of the file that is missing or of another type.
        """
        check_fields(raw, self.told_by, self.optional, where)
        ours = {theirs: own for own, theirs in self.called.items()}
        record = {ours.get(name, name): value for name, value in raw.items()}
        return self.settle(record, where) if self.settle else record


def _title_and_text(record: JsonObject, where: str) -> JsonObject:
    """Split FlashRAG's `contents`: the first of several lines is the title, perhaps in quotes."""
    first, line_break, rest = record["text"].partition("\n")
    if not line_break or not rest.strip():
        return record
    title = first.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return {**record, "title": title, "text": rest}


def _context_id(context: str) -> str:
    return hashlib.blake2b(context.encode("utf-8"), digest_size=8).hexdigest()


def _squad_passage(record: JsonObject, where: str) -> JsonObject:
    """The context of a question; several questions may give the same passage."""
    return {
        "id": _context_id(record["text"]),
        "title": record.get("title") or "",
        "text": record["text"],
    }


def _squad_question(record: JsonObject, where: str) -> JsonObject:
    """A question with its context as gold passage, and as the passage that the file gives."""
    answers, context = record.pop("answers"), record.pop("context")
    check_fields(answers, {"text": list}, {}, f"{where}: field 'answers'")
    passage = {"id": _context_id(context), "title": record.pop("title", ""), "text": context}
    accepted = list(dict.fromkeys(answers["text"]))
    return {**record, "answers": accepted, "gold": [passage["id"]], "passages": [passage]}


def _listed_answers(record: JsonObject, where: str) -> JsonObject:
    """Answers as DPR writes them: a Python list."""
    try:
        answers = ast.literal_eval(record["answers"])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        answers = None
    if not isinstance(answers, list):
        raise UserError(
            f"{where}: field 'answers' must be a list such as ['Paris', 'paris'], "
            f"but is {record['answers'][:60]!r}"
        )
    return {**record, "answers": answers}


# The first layout that fits the first record is used for the whole file. Ours comes last: a record
# of no other layout is checked against it, so that the error names the missing field.
PASSAGES = (
    Layout(
        "BEIR",
        told_by={"_id": (str, int), "text": str},
        optional={"title": str},
        called={"id": "_id"},
    ),
    Layout(
        "FlashRAG",
        told_by={"id": (str, int), "contents": str},
        optional={"title": str},
        called={"text": "contents"},
        settle=_title_and_text,
    ),
    Layout(
        "Hugging Face SQuAD",
        told_by={"context": str, "question": str},
        optional={"title": str},
        called={"text": "context"},
        repeats=True,
        settle=_squad_passage,
    ),
    Layout(
        "DPR tsv",
        told_by={"id": str, "text": str},
        optional={"title": str},
        table=True,
    ),
    Layout(
        "atlas-jax",
        told_by={**_ID, "text": str},
        optional={"title": str, "section": str},
    ),
)

QUESTIONS = (
    Layout(
        "BEIR",
        told_by={"_id": (str, int), "text": str},
        called={"id": "_id", "question": "text"},
    ),
    Layout(
        "FlashRAG",
        told_by={"question": str, "golden_answers": list},
        optional=_ID,
        called={"answers": "golden_answers"},
    ),
    Layout(
        "Hugging Face SQuAD",
        told_by={"question": str, "context": str, "answers": dict},
        optional={**_ID, "title": str},
        settle=_squad_question,
    ),
    Layout(
        "DPR tsv",
        told_by={"question": str, "answers": str},
        table=True,
        columns=("question", "answers"),
        settle=_listed_answers,
    ),
    Layout("atlas-jax", told_by={"question": str}),
)


def read_layout(
    path: str | os.PathLike[str],
    layouts: Sequence[Layout],
    check: Callable[[int, JsonObject, Layout], None] | None = None,
    rows: RowsConfig = STRICT,
    part: Part | None = None,
) -> Iterator[tuple[int, JsonObject]]:
    """Yield `(line, record)` of a data file, the record with our fields.

    Another layout than ours is reported in one line on stderr.

    Args:
      path: jsonl, or a table of tab-separated values with the suffix .tsv or .csv; both may
        have .gz behind it.
      layouts: `PASSAGES` or `QUESTIONS`.
      check: further checks of a record; raises a UserError.
      rows: what happens to a broken row.
      part: read only these lines, of a file of which `layout_of` says that it can be divided.

    Raises:
      UserError: names file, line and field; see `read_jsonl`.
    """
    is_table = as_path(path).name.removesuffix(".gz").endswith((".tsv", ".csv"))
    usable = [layout for layout in layouts if layout.table == is_table]
    found: list[Layout] = []
    if part is not None and part.start and (first := layout_of(path, layouts)):
        found.append(first)
    made: list[JsonObject] = []
    seen: set[str] = set()

    def take(number: int, raw: JsonObject) -> None:
        made.clear()
        if not found and (fitting := [layout for layout in usable if layout.fits(raw)]):
            found.append(fitting[0])
            if fitting[0] is not layouts[-1]:
                _tell(path, fitting[0])
        layout = found[0] if found else usable[-1]
        record = layout.convert(raw, f"{path}:{number}")
        if layout.repeats and record["id"] in seen:
            return
        if check is not None:
            check(number, record, layout)
        if layout.repeats:
            seen.add(record["id"])
        made.append(record)

    if is_table:
        read = _read_table(path, usable[-1].columns, take, rows)
    else:
        read = read_jsonl(path, check=take, rows=rows, part=part)
    for number, _ in read:
        for record in made:
            yield number, record


def layout_of(path: str | os.PathLike[str], layouts: Sequence[Layout]) -> Layout | None:
    """The layout of a plain jsonl file whose lines can be read apart from each other, or None.

    It must show in the first record, and need no other line to read one.
    """
    try:
        raw = next((record for _, record in read_jsonl(path)), {})
    except UserError:  # whoever reads it will tell
        return None
    fitting = (one for one in layouts if not one.table and one.fits(raw))
    found = next(fitting, None)
    return None if found is None or found.repeats else found


def _tell(path: str | os.PathLike[str], layout: Layout) -> None:
    ours = {theirs: own for own, theirs in layout.called.items()}
    names = [f"{name} is {ours[name]}" if name in ours else name for name in layout.told_by]
    print(f"{path}: read in {layout.name}'s layout ({', '.join(names)})", file=sys.stderr)


def _read_table(
    path: str | os.PathLike[str],
    columns: tuple[str, ...],
    check: Callable[[int, JsonObject], None],
    policy: RowsConfig,
) -> Iterator[tuple[int, JsonObject]]:
    """Rows of tab-separated values with CSV's quotes, each with the number of its last line.

    Raises:
      UserError: as `read_jsonl`; a line that is not UTF-8 always ends the reading.
    """
    broken = BrokenRows(path, policy)
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_VALUE))
    rows = csv.reader(text_lines(path), delimiter="\t", strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            where = f"{path}:{rows.line_num}"
            broken.take(UserError(f"{where}: no row of tab-separated values: {error}"))
            continue
        if row is None:
            break
        if not columns:
            columns = tuple(row)
            continue
        if not row:
            continue
        try:
            record = _row(row, columns, f"{path}:{rows.line_num}")
            check(rows.line_num, record)
        except UserError as error:
            broken.take(error)
            continue
        yield rows.line_num, record
    broken.tell()


def _row(row: list[str], columns: tuple[str, ...], where: str) -> JsonObject:
    if len(row) != len(columns):
        raise UserError(
            f"{where}: a row of {len(row)} values, separated by tabs, where {len(columns)} were "
            f"expected: {', '.join(columns)}"
        )
    return dict(zip(columns, row, strict=True))
