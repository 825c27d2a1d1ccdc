"""Strict reading and atomic writing of JSON-lines files, plain or gzip'd."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import input_file, utf8_text
from atlas_jax.core.whole import whole_file

FieldTypes = Mapping[str, type | tuple[type, ...]]
Check = Callable[[int, dict[str, Any]], None]

_MAX_REPORTS = 20  # broken lines of one file that are told one by one

_JSON_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """What becomes of a broken line of a data file.

    Attributes:
      skip_broken: False stops at the first one. True leaves them out and reports each on
        stderr by file and line, with their number at the end.
    """

    skip_broken: bool = False


STRICT = RowsConfig()


def read_jsonl(
    path: str | os.PathLike[str],
    required: FieldTypes | Sequence[str] = (),
    optional: FieldTypes | None = None,
    check: Check | None = None,
    rows: RowsConfig = STRICT,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line_number, record)` of every line that is not blank; lines count from 1.

    Args:
      path: the file; a name ending in `.gz` is decompressed on the way.
      required: names of the fields that every record must have, or a mapping from the
        name to the type (or tuple of types) that its value must have.
      optional: types of fields that may be absent (or null).
      check: further demands on a record, called with its line number; raises a UserError.
      rows: what becomes of a broken line.

    Raises:
      UserError: naming `file:line`, when the file cannot be opened or read on, or a line
        is not UTF-8, not JSON, cut off or no object, a field is missing or of another type,
        or `check` refuses it. Such a line is only reported with `rows.skip_broken`.
    """
    needed = required if isinstance(required, Mapping) else dict.fromkeys(required, object)
    broken = BrokenRows(path, rows)
    for number, raw in raw_lines(path):
        where = f"{path}:{number}"
        if number == 1:
            raw = raw.removeprefix(strict_json.BYTE_ORDER_MARK)
        if not raw.strip():
            continue
        try:
            record = _parse(raw.rstrip(), where)
            check_fields(record, needed, optional or {}, where)
            if check is not None:
                check(number, record)
        except UserError as error:
            broken.take(error)
            continue
        yield number, record
    broken.tell()


class BrokenRows:
    """What becomes of the broken rows of one file, see `RowsConfig`; for readers of any format."""

    def __init__(self, path: str | os.PathLike[str], rows: RowsConfig = STRICT) -> None:
        """Begin with none."""
        self._path, self._skips, self._count = path, rows.skip_broken, 0

    def take(self, error: UserError) -> None:
        """Raise the error, or count and report it."""
        if not self._skips:
            raise error
        self._count += 1
        if self._count <= _MAX_REPORTS:
            print(f"skipped: {error}", file=sys.stderr)

    def tell(self) -> None:
        """Report how many there were, if any."""
        if self._count:
            print(f"skipped: {self._count} broken rows of {self._path} in all", file=sys.stderr)


def check_fields(
    record: Mapping[str, Any], required: FieldTypes, optional: FieldTypes, where: str
) -> None:
    """Raise a UserError that starts with `where` unless the record's fields fit."""
    for name, kind in required.items():
        if name not in record:
            has = ", ".join(map(repr, record)) or "no fields"
            raise UserError(f"{where}: field {name!r} is missing; the record has {has}")
        _check_type(record[name], kind, name, where)
    for name, kind in optional.items():
        if record.get(name) is not None:
            _check_type(record[name], kind, name, where)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line and return how many; gzip'd where the name ends in `.gz`.

    The file appears under its name only when it is complete: a failure on the way leaves
    what was there before.
    """
    count = 0
    with atomic_text(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextlib.contextmanager
def atomic_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open a UTF-8 text file for writing, gzip'd by its name; see `whole_file`."""
    with whole_file(path) as raw, _text_in(raw, Path(path)) as text:
        yield text


@contextlib.contextmanager
def _text_in(raw: BinaryIO, target: Path) -> Iterator[TextIO]:
    """Text that becomes UTF-8 in `raw`, compressed if the name of the target says so."""
    with contextlib.ExitStack() as stack:
        binary: Any = raw
        if target.suffix == ".gz":  # no name and time inside: equal text, equal bytes
            binary = stack.enter_context(
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            )
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


def raw_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line of a file, plain or gzip'd; lines count from 1.

    Raises:
      UserError: names the file that is not there or is no regular file, or the line where it
        cannot be read on.
    """
    number, source = 0, input_file(path)
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(source.open("rb"))
            if source.suffix == ".gz":
                file = stack.enter_context(gzip.open(file))
            for number, raw in enumerate(file, start=1):
                yield number, raw
    except (EOFError, OSError, zlib.error) as error:
        problem = str(error) or type(error).__name__
        raise UserError(f"{path}:{number + 1}: cannot read on: {problem}") from error


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Every line of a UTF-8 file, plain or gzip'd, with its end; no byte order mark.

    Raises:
      UserError: as `raw_lines`, or names the line that is not UTF-8.
    """
    for number, raw in raw_lines(path):
        text = utf8_text(raw, f"{path}:{number}") if number == 1 else _decoded(raw, path, number)
        yield text


def _decoded(raw: bytes, path: str | os.PathLike[str], number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return utf8_text(raw, f"{path}:{number}")  # which says what is wrong


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    record = strict_json.parse(raw, where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: {_describe(record)} where a JSON object was expected")
    return record


def _check_type(value: Any, kind: type | tuple[type, ...], name: str, where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # In Python true is an int; in the data it is not.
    is_wrong_bool = isinstance(value, bool) and bool not in kinds and object not in kinds
    if is_wrong_bool or not isinstance(value, kinds):
        wanted = " or ".join(_JSON_NAMES.get(k, k.__name__) for k in kinds)
        raise UserError(f"{where}: field {name!r} must be {wanted}, but is {_describe(value)}")


def _describe(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)
