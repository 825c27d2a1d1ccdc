"""JSON from files: what is read, and how everything else is refused."""

import json
import random
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from msgspec import Meta

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError


class Tower(TypedDict):
    name: str
    width: Annotated[int, Meta(ge=1, le=8)]


class Model(TypedDict):
    towers: list[Tower]
    note: dict[str, Any]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5e3, null, true, "é\\ud83d\\ude00"]}',
        "[]",
        str(2**64 - 1),
        "[" * 99 + "]" * 99,
    ],
)
def test_standard_json_is_read_as_the_standard_library_reads_it(text: str) -> None:
    assert strict_json.parse(text.encode(), "x") == json.loads(text)
    assert strict_json.parse(b"\xef\xbb\xbf" + text.encode(), "x") == json.loads(text)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * 5000 + b"]" * 5000, "lie in each other too deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "lie in each other too deep"),
        (b"[" * 150 + b"]" * 150, "lie in each other more than 100 deep"),
        (b"1" * 5000, "out of range"),
        (b"1" * 30, "a whole number of 97 bits"),
        (b'{"a": [{"b": ' + b"9" * 25 + b"}]}", "a whole number of 84 bits"),
        (b"1e999", "x.json: inf is no number of JSON"),
        (b"[NaN]", "[0]: nan is no number of JSON"),
        (b'{"a": {"b": [1, 1e999]}}', "a.b[1]: inf is no number of JSON"),
        (b"-Infinity", "-inf is no number of JSON"),
        (b'{"a": 1', "cut off (after 7 bytes)"),
        (b"", "cut off"),
        (b"{'a': 1}", "not JSON"),
        (b"{} {}", "not JSON (trailing characters at byte 5)"),
        (b'"caf\xe9"', "not UTF-8 at byte 5 (0xe9)"),
        (b'"\xed\xa0\x80"', "not UTF-8 at byte 2 (0xed)"),
        (b'"\\ud800"', r"'\ud800' is half a character"),
        (b'"a\\udc00b"', r"'\udc00' is half a character"),
        ("{}".encode("utf-16"), "not UTF-8 at byte 1 (0xff)"),
    ],
)
def test_anything_else_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        strict_json.parse(raw, "x.json")
    assert str(caught.value).startswith("x.json: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "x: expected an object, got a list"),
        ('{"towers": []}', "x: the field note is missing"),
        ('{"towers": 1, "note": {}}', "x: towers: expected a list, got a whole number"),
        ('{"towers": [{"name": 1, "width": 1}], "note": {}}', "x: towers[0].name: expected a"),
        ('{"towers": [{"width": 1}], "note": {}}', "x: the field towers[0].name is missing"),
        ('{"towers": [{"name": "", "width": 9}], "note": {}}', "expected a whole number <= 8"),
        ('{"towers": [], "note": null}', "x: note: expected an object, got null"),
    ],
)
def test_a_field_of_another_type_is_named(text: str, message: str) -> None:
    for read in (lambda: strict_json.parse_as(text.encode(), Model, "x"),
                 lambda: strict_json.convert(json.loads(text), Model, "x")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            read()
        assert message in str(caught.value)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"towers": [], "note": {}}')
    assert strict_json.read(tmp_path / "a.json", Model) == {"towers": [], "note": {}}
    for path, message in ((tmp_path / "b.json", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=message):
            strict_json.read(path)


TEXTS = ('[[[{"\\', "a]]}}", "x", 1, None, '\\\\"[', '"', "\\")


def _depth_of(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth_of, items), default=0)


def _some(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(TEXTS)
    if rng.random() < 0.5:
        return [_some(rng, depth - 1) for _ in range(rng.randrange(1, 3))]
    return {rng.choice(("[", '"{', "\\")): _some(rng, depth - 1)}


def test_brackets_and_marks_within_texts_are_no_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_DEEPEST", 3)
    rng = random.Random(0)
    for _ in range(500):
        value = _some(rng, 6)
        raw = json.dumps(value).encode()
        if _depth_of(value) <= 3:
            assert strict_json.parse(raw, "x") == value
        else:
            with pytest.raises(UserError, match="more than 3 deep"):
                strict_json.parse(raw, "x")
