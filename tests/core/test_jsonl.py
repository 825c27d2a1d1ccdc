"""Reading jsonl strictly and writing it atomically."""

import gzip

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import RowsConfig, atomic_text, read_jsonl, write_jsonl


def _write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_is_written_is_read_again(tmp_path, name):
    rows = [{"id": "1", "text": "São Tomé\u2028東京"}, {"id": "2", "text": "a\nb"}]
    path = tmp_path / "new" / name
    assert write_jsonl(path, rows) == 2
    assert list(read_jsonl(path, required=("id",))) == [(1, rows[0]), (2, rows[1])]
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_equal_rows_give_equal_gzip_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, [{"x": 1}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_blank_lines_count_but_give_nothing(tmp_path):
    path = _write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "1", "te', "cut off"),
        (b'{"id": "1", "text": "ab', "cut off"),
        (b'{"id": "1",}', "not JSON"),
        (b'["id"]', "a list where a JSON object was expected"),
        (b'{"id": "1", "text": "caf\xe9"}', "not UTF-8 at byte 25 (0xe9)"),
        (b'{"id": "1", "text": "a\\ud83d."}', "'\\ud83d' is half a character"),
        (b'{"id": "1"}', "field 'text' is missing; the record has 'id'"),
        (b'{"id": "1", "text": 3}', "field 'text' must be a string, but is a whole number"),
        (b'{"id": true, "text": ""}', "field 'id' must be a string or a whole number, but is true"),
        (b'{"id": 1, "text": "", "n": "x"}', "field 'n' must be a list, but is a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = _write(tmp_path / "bad.jsonl", b'{"id": "0", "text": "", "n": null}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path, {"id": (str, int), "text": str}, {"n": list}))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_escaped_characters_of_two_halves_are_read(tmp_path):
    path = _write(tmp_path / "a.jsonl", rb'{"text": "\ud83d\ude00"}')
    assert list(read_jsonl(path)) == [(1, {"text": "\U0001f600"})]


def test_a_truncated_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b'{"id": "0"}\n' * 5000)
    path = _write(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz:\d+: cannot read on"):
        list(read_jsonl(path))


def test_a_file_that_is_no_gzip_is_named(tmp_path):
    path = _write(tmp_path / "plain.jsonl.gz", b'{"id": "0"}\n')
    with pytest.raises(UserError, match=r"plain\.jsonl\.gz:1: cannot read on"):
        list(read_jsonl(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_failed_write_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    write_jsonl(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_jsonl(path, rows())
    assert list(read_jsonl(path)) == [(1, {"a": 1})]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_atomic_text_replaces_at_the_end_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_text(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_broken_rows_are_skipped_only_when_asked(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"b": 1}\n{"a": 2}\n{"a": -1}\n', encoding="utf-8")

    def check(number, record):
        if record["a"] < 0:
            raise UserError(f"{path}:{number}: below 0")

    with pytest.raises(UserError, match=r"data\.jsonl:2: not JSON"):
        list(read_jsonl(path, {"a": int}, None, check))
    lenient = RowsConfig(skip_broken=True)
    assert list(read_jsonl(path, {"a": int}, None, check, lenient)) == [
        (1, {"a": 1}),
        (4, {"a": 2}),
    ]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in told[:3]] == [
        ["skipped", f"{path}:2"], ["skipped", f"{path}:3"], ["skipped", f"{path}:5"]
    ]  # fmt: skip
    assert told[3:] == [f"skipped: 3 broken rows of {path} in all"]


def test_a_file_that_cannot_be_read_on_is_never_skipped(tmp_path):
    lenient = RowsConfig(skip_broken=True)
    with pytest.raises(UserError, match="no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl", rows=lenient))
