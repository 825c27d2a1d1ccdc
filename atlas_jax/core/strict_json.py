"""The strict, typed reader of JSON from files.

A type gives the fields, their kinds and their bounds. Anything else is an error that names the file
and the field. Only standard JSON is read: no NaN or Infinity, no numbers that are too large for a
program, no lists nested a thousand deep.
"""

import json
import math
import os
import re
from typing import Any, TypeVar

import msgspec
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import read_bytes, utf8_text

T = TypeVar("T")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DEEPEST = 100  # levels of nested lists and objects; tokenizers and models have fewer than 20
_BITS = 64  # largest size of a whole number
_OPENING = (b"[", b"{")
_OPENING_CODES, _CLOSING_CODES = list(b"[{"), list(b"]}")
_LONG_NUMBER = re.compile(rb"\d{19}")
_HALF = re.compile(
    r"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB]..)(?<!\\)(?:\\\\)*(\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_AT_BYTE = re.compile(r"^JSON is malformed: (.*) \(byte (\d+)\)$")
_AT_FIELD = re.compile(r"^(.*?)(?: - at `(?:key in )?\$(.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field (\S+)$")
_WORDS = {
    "str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false",
    "array": "a list", "object": "an object", "null": "null",
}  # fmt: skip


def parse(raw: bytes, where: str) -> Any:
    """The value of JSON text in UTF-8, with or without a byte order mark.

    Raises:
      UserError: the text is not UTF-8, not JSON, cut off or nested too deep, or it has a number
        that is too large or half a character; `where` begins the message.
    """
    return parse_as(raw, Any, where)


def parse_as(raw: bytes, kind: type[T] | Any, where: str) -> T:
    """Like `parse`, for a type: dataclasses, TypedDicts, `Annotated` with `msgspec.Meta`, ...

    Raises:
      UserError: as `parse`, or a field is missing, of another type or out of bounds; it is named.
    """
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        value: T = msgspec.json.decode(raw, type=kind)
    except RecursionError:
        raise UserError(f"{where}: lists and objects lie in each other too deep") from None
    except UnicodeDecodeError:
        utf8_text(raw, where)
        raise
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {_not_finite(raw) or _explained(str(error))}") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{where}: {_malformed(str(error), raw, where)}") from None
    outside = _outside_of_texts(raw)
    if _depth(outside) > _DEEPEST or _LONG_NUMBER.search(outside):
        _check_extremes(value, where)
    return value


def _outside_of_texts(raw: bytes) -> bytes:
    """JSON without what its strings hold."""
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(raw.split(b'"')[::2])


def _depth(outside: bytes) -> int:
    """How many lists and objects lie in each other, of JSON without its strings."""
    if sum(map(outside.count, _OPENING)) <= _DEEPEST:
        return 0
    signs = np.frombuffer(outside, np.uint8)
    steps = np.isin(signs, _OPENING_CODES).astype(np.int32) - np.isin(signs, _CLOSING_CODES)
    return int(np.cumsum(steps).max())


def read(path: str | os.PathLike[str], kind: type[T] | Any = Any) -> T:
    """The value of a JSON file, of a type; see `parse_as`.

    Raises:
      UserError: there is no such file, it cannot be read, or as `parse_as`.
    """
    return parse_as(read_bytes(path), kind, str(path))


def convert(value: Any, kind: type[T] | Any, where: str) -> T:
    """Check a value that another library has parsed against a type.

    Raises:
      UserError: as `parse_as`.
    """
    try:
        converted: T = msgspec.convert(value, kind)
    except RecursionError:
        raise UserError(f"{where}: lists and objects lie in each other too deep") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {_explained(str(error))}") from None
    return converted


def _explained(text: str) -> str:
    """msgspec's message about a field in this project's form: the field comes first."""
    found = _AT_FIELD.match(text)
    assert found is not None
    problem, field = found[1], (found[2] or "").lstrip(".")
    missing = _MISSING.match(problem.replace("`", ""))
    if missing:
        name = f"{field}.{missing[1]}" if field else missing[1]
        return f"the field {name} is missing"
    problem = re.sub(r"`(\w+)`", lambda word: _WORDS.get(word[1], word[1]), problem)
    problem = problem[:1].lower() + problem[1:].replace("`", "")
    return f"{field}: {problem}" if field else problem


def _malformed(text: str, raw: bytes, where: str) -> str:
    """Why a text is not JSON."""
    half = _HALF.search(utf8_text(raw, where))
    if half:
        return f"'{half[1] or half[2]}' is half a character, without its other half"
    at_fault = _not_finite(raw)
    if at_fault:
        return at_fault
    if text == "Input data was truncated":
        return f"cut off (after {len(raw.rstrip())} bytes)"
    at = _AT_BYTE.match(text)
    return f"not JSON ({f'{at[1]} at byte {int(at[2]) + 1}' if at else text})"


def _not_finite(raw: bytes) -> str:
    """The field that holds what is no number in JSON, NaN, Infinity or 1e999; '' if none does."""
    try:
        level: list[tuple[str, Any]] = [("", json.loads(raw))]  # which takes them
    except (ValueError, RecursionError):
        return ""
    for _ in range(_DEEPEST):
        below: list[tuple[str, Any]] = []
        for place, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                named = f"{place}: " if place else ""
                return f"{named}{value} is no number of JSON; a finite number is needed"
            if isinstance(value, dict):
                below += [(f"{place}.{key}".lstrip("."), item) for key, item in value.items()]
            elif isinstance(value, list):
                below += [(f"{place}[{number}]", item) for number, item in enumerate(value)]
        level = below
    return ""


def _check_extremes(value: Any, where: str) -> None:
    """Refuse whole numbers that are too large and nesting that is too deep."""
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, int) and item.bit_length() > _BITS:
                raise UserError(f"{where}: a whole number of {item.bit_length()} bits")
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
        if not below:
            return
        level = below
    raise UserError(f"{where}: lists and objects lie in each other more than {_DEEPEST} deep")
