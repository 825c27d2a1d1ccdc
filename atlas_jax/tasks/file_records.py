"""Records that stay in their file: the place of each is in memory, and nothing of its text."""

import array
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import (
    STRICT,
    BrokenRows,
    FieldTypes,
    RowsConfig,
    check_fields,
    line_starts,
)
from atlas_jax.core.layouts import Layout
from atlas_jax.core.paths import expect_bytes, input_file, is_remote
from atlas_jax.core.unique import hash_id, repeated
from atlas_jax.tasks.base import Record, read_records, record_of, taken

_PACKED = (".gz", ".tsv", ".csv")  # no line can be read without those before it


class _Bytes:
    """The bytes of a file, for any number of threads; they stay if the file loses its name."""

    def __init__(self, file: IO[bytes]) -> None:
        self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._handle, end - start, start)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        expect_bytes(self._handle, ranges)


class FileRecords(Sequence[Record]):
    """The checked records of a file, each read anew whenever it is asked for.

    A record takes 24 bytes: where its line begins and ends, and the line's number. A file that is
    renamed or removed meanwhile is still read. Several threads may read.
    """

    def __init__(
        self, path: str, file: _Bytes, required: FieldTypes, optional: FieldTypes, places: Any
    ) -> None:
        """Records of lines of jsonl in this project's layout.

        Args:
          path: the file that errors name.
          file: of the lines.
          required, optional: types of the task's own fields.
          places: int64 [3, n]: first byte in `file`, the byte behind the last, line of `path`.
        """
        self._told = (path, file, required, optional)
        self._places = places

    def __len__(self) -> int:
        """Number of records."""
        return int(self._places.shape[1])

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> "FileRecords": ...

    def __getitem__(self, row: int | slice) -> "Record | FileRecords":
        """Read a record; a slice reads nothing.

        Raises:
          UserError: the file has changed, and what stands at this place is no record.
        """
        if isinstance(row, slice):
            return FileRecords(*self._told, self._places[:, row])
        path, file, required, optional = self._told
        start, end, line = self._places[:, row].tolist()
        where = f"{path}:{line}"
        raw = strict_json.parse(file.read(start, end), where)
        if not isinstance(raw, dict):
            raise UserError(f"{where}: there is no record any more; the file has changed")
        check_fields(raw, required, optional, where)
        return record_of(raw, (*required, *optional), where, str(line))

    def expect(self, rows: Sequence[int]) -> None:
        """Ask for the bytes of some records, which are then read one by one."""
        starts, ends, _ = self._places[:, list(rows)].tolist()
        self._told[1].expect(zip(starts, ends, strict=True))

    def line(self, row: int) -> int:
        """The line of a record in its file."""
        return int(self._places[2, row])

    def without(self, rows: Sequence[int]) -> "FileRecords":
        """All records but some."""
        return FileRecords(*self._told, np.delete(self._places, rows, axis=1))


def fetch(records: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Some of a task's records; where they lie in a file, their bytes are asked for together."""
    if isinstance(records, FileRecords):
        records.expect(rows)
    return [records[row] for row in rows]


def open_records(
    path: str | Path,
    required: FieldTypes,
    optional: FieldTypes,
    not_empty: Collection[str],
    layouts: Sequence[Layout],
    wanted: Callable[[Record], bool],
    rows: RowsConfig = STRICT,
) -> FileRecords:
    """Check a file and return its wanted records; their texts stay in the file.

    A compressed file, a table, another layout than this project's or a file in a bucket is copied
    first, record by record, to a temporary file in the folder that TMPDIR names.

    Args:
      path, required, optional, not_empty, layouts, rows: as in `tasks.base.read_records`.
      wanted: whether a record is kept.

    Raises:
      UserError: names file, line and field; or two of the wanted records have the same id.
    """
    hashes = array.array("Q")
    with _Places(path, required, optional) as places:
        for line, record in read_records(path, required, optional, not_empty, None, rows, layouts):
            if wanted(record):
                places.add(line, record)
                hashes.append(hash_id(record.id))
        found = places.records()
    twice = list(repeated(np.asarray(hashes, np.uint64), lambda row: found[row].id))
    broken = BrokenRows(path, rows)
    for row, first in twice:
        one = found[row]
        broken.take(UserError(f"{one.place}: {taken(one.id, found.line(first))}"))
    return found.without([row for row, _ in twice]) if twice else found


class _Places:
    """Where the lines of records lie: in their own file, or in a copy."""

    def __init__(self, path: str | Path, required: FieldTypes, optional: FieldTypes) -> None:
        self._path, self._fields = path, (required, optional)
        packed = is_remote(path) or str(path).endswith(_PACKED)
        self._starts_n = np.zeros(0, np.int64) if packed else line_starts(path)
        self._copy: IO[bytes] | None = None
        if packed:
            self._begin_copy()
        self._ends, self._lines = array.array("q", [0]), array.array("q")

    def __enter__(self) -> "_Places":
        return self

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            self._copy.close()

    def _begin_copy(self) -> None:
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115  (closed on leaving the block)

    def add(self, line: int, record: Record) -> None:
        self._lines.append(line)
        if len(self._lines) == 1 and self._copy is None and not self._is_own(record):
            self._begin_copy()
        if self._copy is not None:
            self._ends.append(self._ends[-1] + self._copy.write(_line_of(record)))

    def records(self) -> FileRecords:
        lines_n = np.asarray(self._lines, np.int64)
        if self._copy is not None:
            self._copy.flush()
            ends_n = np.asarray(self._ends, np.int64)
            return self._read(self._copy, ends_n[:-1], ends_n[1:], lines_n)
        with input_file(self._path).open("rb") as file:
            return self._read(file, self._starts_n[lines_n - 1], self._starts_n[lines_n], lines_n)

    def _read(self, file: IO[bytes], *places: np.ndarray) -> FileRecords:
        return FileRecords(str(self._path), _Bytes(file), *self._fields, np.stack(places))

    def _is_own(self, record: Record) -> bool:
        """Whether the first record is what stands in its line; in another layout it is not."""
        try:
            return self.records()[0] == record
        except UserError:
            return False


def _line_of(record: Record) -> bytes:
    """A line of which `record_of` makes the record again."""
    shared = {"id": record.id, "gold": record.gold_ids, "negatives": record.negative_ids}
    given = {} if record.passages is None else {"passages": record.passages}
    raw = {**record.meta, **shared, **given, **record.fields}
    return (json.dumps(raw, ensure_ascii=False) + "\n").encode("utf-8")
