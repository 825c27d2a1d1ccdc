"""Folders, patterns and texts as a corpus."""

import json

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import WORDS, passage_files, read_passages


def rows(path):
    return [record for _, record in read_passages(path)]


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.md").write_text("not a note")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "a.jsonl").write_text(json.dumps({"id": 0, "title": "", "text": "zero"}) + "\n")
    (folder / "sub" / "b.md").write_text(
        "\ufeff# Varda\n\nVarda is a river town.\nIt has a bridge.\n\n## Mayor\n\nIlse Korn.\n\n"
        "```\n# no heading\n```\n\n### Empty\n",
        encoding="utf-8",
    )
    (folder / "sub" / "c.txt").write_text("First paragraph.\n\n# no heading\n" + "word " * 250)
    return folder


def test_a_folder_is_read_with_its_subfolders(notes):
    assert [name.removeprefix(f"{notes}/") for name in passage_files(notes)] == [
        "a.jsonl", "sub/b.md", "sub/c.txt",
    ]  # fmt: skip
    found = rows(notes)
    assert found[0] == {"id": 0, "title": "", "text": "zero"}
    assert found[1:4] == [
        {"id": "sub/b.md#0", "title": "Varda", "section": "",
         "text": "Varda is a river town. It has a bridge."},
        {"id": "sub/b.md#1", "title": "Varda", "section": "Mayor",
         "text": "Ilse Korn. ``` # no heading ```"},
        {"id": "sub/c.txt#0", "title": "c", "section": "", "text": "First paragraph."},
    ]  # fmt: skip
    assert [len(row["text"].split()) for row in found[4:]] == [WORDS, WORDS, 53]
    assert len({row["id"] for row in found}) == len(found)


def test_a_pattern_and_one_text_are_read(notes):
    assert [row["id"] for row in rows(notes / "sub" / "b.md")] == ["b.md#0", "b.md#1"]
    assert [row["id"] for row in rows(f"{notes}/*.jsonl")] == [0]
    assert rows(f"{notes}/**/*.md")[0]["title"] == "Varda"


def test_the_line_of_a_passage_is_where_it_begins(notes):
    assert [place[1] for place, _ in read_passages(notes / "sub" / "b.md")] == [3, 8]


def test_jsonl_that_is_called_a_text_is_read_as_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text('{"id": "1", "title": "t", "text": "x"}\n')
    assert rows(tmp_path / "a.txt") == [{"id": "1", "title": "t", "text": "x"}]


def test_what_cannot_be_read_says_what_is_wanted(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    for path in (tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(UserError, match=r"jsonl files of {id, title, text}"):
            passage_files(path)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        passage_files(tmp_path / "none.jsonl")
    (tmp_path / "b.md").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"b\.md:1: not UTF-8 at byte 4"):
        rows(tmp_path / "b.md")


def test_a_set_of_shards_is_read_when_it_is_whole(tmp_path):
    for number in (0, 2):
        path = tmp_path / f"passages-{number:05d}-of-00003.jsonl"
        path.write_text(f'{{"id": "{number}", "text": "t"}}\n')
    for given in (tmp_path, tmp_path / "passages-*.jsonl"):
        with pytest.raises(
            UserError, match=r"passages-00001-of-00003\.jsonl is missing: the set of 3"
        ):
            passage_files(given)
    (tmp_path / "passages-00001-of-00003.jsonl").write_text('{"id": "1", "text": "t"}\n')
    assert [row["id"] for _, row in read_passages(tmp_path)] == ["0", "1", "2"]
    assert len(passage_files(tmp_path / "passages-0000[02]*")) == 2  # left out on purpose
