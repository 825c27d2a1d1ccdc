"""Strict reading and atomic writing of JSON-lines files, plain or gzip'd."""

import array
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
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import input_file, utf8_text
from atlas_jax.core.whole import whole_file

JsonObject = dict[str, Any]  # what one line holds
FieldTypes = Mapping[str, type | tuple[type, ...]]
Check = Callable[[int, JsonObject], None]

_MAX_REPORTS = 20  # broken lines of a file that are reported one by one

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
    """What happens to a broken line of a data file.

    Attributes:
      skip_broken: False stops at the first one. True skips them and reports each on stderr, by
        file and line, with their number at the end.
    """

    skip_broken: bool = False


STRICT = RowsConfig()


def plain_or_gz(path: Path) -> Path | None:
    """This file, or the one with `.gz` behind its name; None if there is neither."""
    both = (path, path.with_name(f"{path.name}.gz"))
    return next((one for one in both if one.is_file()), None)


class Part(NamedTuple):
    """The lines of a plain file that begin at these bytes.

    Attributes:
      start: the first byte.
      end: the byte behind the last.
      before: lines before them, where they are counted.
    """

    start: int
    end: int
    before: int = 0


def read_jsonl(
    path: str | os.PathLike[str],
    required: FieldTypes | Sequence[str] = (),
    optional: FieldTypes | None = None,
    check: Check | None = None,
    rows: RowsConfig = STRICT,
    part: Part | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line_number, record)` of every line that is not blank; lines count from 1.

    Args:
      path: the file; a name ending in `.gz` is decompressed on the way.
      required: names of the fields that every record must have, or a mapping from the
        name to the type (or tuple of types) that its value must have.
      optional: types of fields that may be absent (or null).
      check: further checks of a record, called with its line number; raises a UserError.
      rows: what happens to a broken line.
      part: read only these lines.

    Raises:
      UserError: names `file:line`. The file cannot be read; or a line is not UTF-8, not JSON, cut
        off or not an object; or a field is missing or of another type; or `check` refuses the
        record. With `rows.skip_broken` a broken line is only reported.
    """
    needed = required if isinstance(required, Mapping) else dict.fromkeys(required, object)
    broken = BrokenRows(path, rows)
    for number, raw in raw_lines(path, part):
        where = f"{path}:{number}"
        if number == 1:
            raw = raw.removeprefix(strict_json.BYTE_ORDER_MARK)
        if not raw.strip():
            continue
        try:
            record = parse_record(raw.rstrip(), where)
            check_fields(record, needed, optional or {}, where)
            if check is not None:
                check(number, record)
        except UserError as error:
            broken.take(error)
            continue
        yield number, record
    broken.tell()


class BrokenRows:
    """Handles the broken rows of one file as `RowsConfig` says; for readers of any format."""

    def __init__(self, path: str | os.PathLike[str], rows: RowsConfig = STRICT) -> None:
        """Begin without broken rows."""
        self._path, self._skips, self._count = path, rows.skip_broken, 0

    def take(self, error: UserError) -> None:
        """Raise the error, or count and report it."""
        if not self._skips:
            raise error
        self._count += 1
        if self._count <= _MAX_REPORTS:
            print(f"skipped: {error}", file=sys.stderr)

    def tell(self) -> None:
        """Report the number of broken rows, if there are any."""
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
    """Write one JSON object a line, gzip'd if the name ends in `.gz`; return their number.

    The file gets its name only when it is complete. After a failure an earlier file is unchanged.
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
    """A text stream that writes UTF-8 to `raw`, gzip'd if the target's name ends in `.gz`."""
    with contextlib.ExitStack() as stack:
        binary: Any = raw
        if target.suffix == ".gz":  # without name and time, so that equal text gives equal bytes
            binary = stack.enter_context(
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            )
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


def raw_lines(
    path: str | os.PathLike[str], part: Part | None = None
) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line of a file, plain or gzip'd; lines count from 1.

    Args:
      part: give only these lines, of a plain file.

    Raises:
      UserError: the file does not exist or is not a regular file, or it cannot be read from a
        line on; names file or line.
    """
    number, source = 0, input_file(path)
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(source.open("rb"))
            if source.suffix == ".gz":
                file = stack.enter_context(gzip.open(file))
            if part is None:
                for number, raw in enumerate(file, start=1):
                    yield number, raw
                return
            at, number = part.start, part.before
            if at:  # the line that holds the byte before begins in an earlier part
                file.seek(at - 1)
                at += len(file.readline()) - 1
            while at < part.end and (raw := file.readline()):
                at, number = at + len(raw), number + 1
                yield number, raw
    except (EOFError, OSError, zlib.error) as error:
        problem = str(error) or type(error).__name__
        raise UserError(f"{path}:{number + 1}: cannot read on: {problem}") from error


def lines_before(path: str | os.PathLike[str], end: int) -> int:
    """How many lines of a plain file begin before a byte at which one begins, or in its line.

    Raises:
      UserError: the file cannot be read.
    """
    count, at = 0, 0
    for _, raw in raw_lines(path):
        if at >= end:
            break
        at, count = at + len(raw), count + 1
    return count


def line_starts(path: str | os.PathLike[str]) -> np.ndarray:
    """The byte at which each line of a plain file begins, and at last its size; int64.

    Raises:
      UserError: as `raw_lines`.
    """
    starts, at = array.array("q", [0]), 0
    for _, raw in raw_lines(path):
        at += len(raw)
        starts.append(at)
    return np.asarray(starts, np.int64)


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Every line of a UTF-8 file, plain or gzip'd, with its line end, without byte order mark.

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
        return utf8_text(raw, f"{path}:{number}")  # raises an error that names the fault


def parse_record(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
      UserError: the line is no JSON object; `where` begins the message.
    """
    record = strict_json.parse(raw, where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: {_describe(record)} where a JSON object was expected")
    return record


def _check_type(value: Any, kind: type | tuple[type, ...], name: str, where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # In Python, True is an int; in the data it must not count as one.
    is_wrong_bool = isinstance(value, bool) and bool not in kinds and object not in kinds
    if is_wrong_bool or not isinstance(value, kinds):
        wanted = " or ".join(_JSON_NAMES.get(k, k.__name__) for k in kinds)
        raise UserError(f"{where}: field {name!r} must be {wanted}, but is {_describe(value)}")


def _describe(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)
