"""Records that stay in their file are those that lay in memory, for a fortieth of the bytes."""

import contextlib
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import FieldTypes, RowsConfig
from atlas_jax.core.layouts import PASSAGES
from atlas_jax.core.unique import hash_id, repeated
from atlas_jax.tasks.base import Record, load_records
from atlas_jax.tasks.cloze import ClozeTask
from atlas_jax.tasks.file_records import fetch
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.pretext import load_passages
from atlas_jax.tasks.section import SectionTask
from atlas_jax.training.data import training_batches

REQUIRED: FieldTypes = {"id": (str, int), "text": str}
OPTIONAL: FieldTypes = {"title": str, "section": str}


def in_memory(path: Path) -> list[Record]:
    return load_records(path, REQUIRED, OPTIONAL, ["id", "text"], layouts=PASSAGES)


def text(number: int) -> str:
    return f"Passage {number} — one of « many » has a word or {number % 7} more than others."


def ours(number: int) -> dict[str, Any]:
    """A passage with all that a line may have; its id is a number now and then."""
    row: dict[str, Any] = {"id": f"p{number}" if number % 3 else number, "text": text(number)}
    more = {"title": f"T{number % 5}", "section": f"S{number % 2}", "url": f"u{number}"}
    given = [{"id": "g", "text": "given"}, {"text": "another", "title": "G"}]
    lists = {"gold": [f"p{number}", 7], "negatives": ["n"], "passages": given}
    return row | more | (lists if number % 2 else {})


def write(path: Path, lines: Sequence[str]) -> Path:
    packed = path.suffix == ".gz"
    raw = "".join(lines).encode("utf-8")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def jsonl(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def plain(folder: Path) -> Path:
    return write(folder / "ours.jsonl", jsonl([ours(number) for number in range(20)]))


def with_marks(folder: Path) -> Path:
    """A byte order mark, blank lines, ends of lines as in Windows, none at the end."""
    lines = [line.replace("\n", "\r\n\r\n") for line in jsonl([ours(n) for n in range(20)])]
    lines[-1] = lines[-1].rstrip()
    return write(folder / "marks.jsonl", ["\ufeff", *lines])


def packed(folder: Path) -> Path:
    return write(folder / "ours.jsonl.gz", jsonl([ours(number) for number in range(20)]))


def table(folder: Path) -> Path:
    rows = [f'{n}\t"{text(n)}\nand a line"\tT{n}\n' for n in range(20)]
    return write(folder / "dpr.tsv", ["id\ttext\ttitle\n", *rows])


def beir(folder: Path) -> Path:
    rows = [{"_id": f"d{n}", "title": "T", "text": text(n), "extra": n} for n in range(20)]
    return write(folder / "beir.jsonl", jsonl(rows))


def flashrag(folder: Path) -> Path:
    rows = [{"id": n, "contents": f'"T{n}"\n{text(n)}'} for n in range(20)]
    return write(folder / "flashrag.jsonl", jsonl(rows))


def squad(folder: Path) -> Path:
    """Every context with two questions: a passage comes twice and is read once."""
    rows = [{"context": text(n // 2), "question": f"{n}?", "title": "T"} for n in range(20)]
    return write(folder / "squad.jsonl", jsonl(rows))


@pytest.mark.parametrize("make", [plain, with_marks, packed, table, beir, flashrag, squad])
def test_records_of_a_file_are_those_that_lay_in_memory(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path)
    expected = in_memory(path)
    found = load_passages(path, 1, "X.min_words")
    assert len(found) == len(expected) >= 10
    assert list(found) == expected
    path.unlink()  # it is open
    assert [found[row] for row in (3, -1, 0)] == [expected[row] for row in (3, -1, 0)]
    assert list(found[2:8][::-2]) == expected[2:8][::-2]


def test_short_passages_are_left_out_and_may_repeat_an_id(tmp_path: Path) -> None:
    rows = [{"id": n % 4, "text": "word " * (n + 1)} for n in range(6)]
    path = write(tmp_path / "x.jsonl", jsonl(rows))
    assert [record.id for record in load_passages(path, 3, "X.min_words")] == ["2", "3", "0", "1"]
    with pytest.raises(UserError, match=r"no passage has 9 words \(X.min_words\)"):
        load_passages(path, 9, "X.min_words")


def test_an_id_that_is_taken_is_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": name, "text": f"word {n}"} for n, name in enumerate("abcbab")]
    path = write(tmp_path / "x.jsonl", jsonl(rows))
    with pytest.raises(UserError, match=r"x.jsonl:4: id 'b' is taken by line 2"):
        load_passages(path, 1, "X.min_words")
    found = load_passages(path, 1, "X.min_words", RowsConfig(skip_broken=True))
    assert [record.place.rpartition(":")[2] for record in found] == ["1", "2", "3"]
    assert "x.jsonl:5: id 'a' is taken by line 1" in capsys.readouterr().err


def test_equal_hashes_of_different_ids_are_no_repetition() -> None:
    ids = ["a", "b", "a", "c"]
    assert list(repeated(np.zeros(4, np.uint64), ids.__getitem__)) == [(2, 0)]
    hashes = np.array([hash_id(one) for one in ids], np.uint64)
    assert list(repeated(hashes, ids.__getitem__)) == [(2, 0)]
    assert list(repeated(np.arange(4, dtype=np.uint64), ids.__getitem__)) == []  # none is looked at


def test_a_file_that_is_written_over_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", jsonl([{"id": n, "text": "some text"} for n in range(3)]))
    found = load_passages(path, 1, "X.min_words")
    with path.open("r+b") as file:
        file.write(b"[1, 2, 3]        ")
    with pytest.raises(UserError, match=r"x.jsonl:1: "):
        found[0]
    assert found[2].id == "2"


def kept_bytes(load: Callable[[Path], Sequence[Any]], path: Path) -> float:
    """Bytes in memory for each record."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        records = load(path)
        return (tracemalloc.get_traced_memory()[0] - before) / len(records)
    finally:
        tracemalloc.stop()


def test_a_record_takes_its_place_alone(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "title": f"T{n}", "section": f"S{n}", "text": "some words " * 50}
        for n in range(5000)
    ]
    for path in (tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"):
        write(path, jsonl(rows))
        assert kept_bytes(in_memory, path) > 1000
        assert kept_bytes(MLMTask(min_words=2).load, path) < 30
        assert kept_bytes(SectionTask(min_words=2).load, path) < 55


def test_facts_and_what_is_drawn_of_them_stay_in_the_file(tmp_path: Path) -> None:
    filler = "These are some words of the text that nobody asks for. " * 8
    rows = [
        {"id": str(n), "title": f"T{n}", "text": f"Area: total: {n} sq km; land: {n}1 ha. {filler}"}
        for n in range(2000)
    ]
    path = write(tmp_path / "x.jsonl", jsonl(rows))
    assert kept_bytes(in_memory, path) > 1000
    assert kept_bytes(ClozeTask().load, path) < 150
    questions = [{"question": "How large is T7?", "answers": ["7 sq km"]}]
    asked = write(tmp_path / "questions.jsonl", jsonl(questions))
    assert kept_bytes(ClozeTask(question_file=str(asked)).load, path) < 150


def test_a_stream_gives_the_same_from_memory_and_from_the_file(tmp_path: Path) -> None:
    path, task = plain(tmp_path), MLMTask(min_words=2)
    apart, together = task.load(path), in_memory(path)
    of = [training_batches(task, records, list, 6, seed=4) for records in (apart, together)]
    for _ in range(7):
        assert next(of[0]) == next(of[1])


class Counted(Sequence[Record]):
    """Notes which records are read."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records, self.read = records, list[str]()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: Any) -> Any:
        self.read.append(self.records[row].id)
        return self.records[row]


def test_processes_read_their_own_records_alone(tmp_path: Path) -> None:
    path, task = plain(tmp_path), MLMTask(min_words=2)
    shares: list[set[str]] = []
    for rows in ([0, 1, 5], [2, 3], [4]):
        records = Counted(task.load(path))
        batch = next(training_batches(task, records, list, 6, 0, rows))
        assert records.read[: len(rows)] == [example.id for example in batch]
        shares.append({example.id for example in batch})
    assert sum(map(len, shares)) == len(set().union(*shares)) == 6


def test_sections_are_told_from_the_file(tmp_path: Path) -> None:
    rows = [
        {"id": n, "title": f"T{n % 2}", "section": ("A", "B ", "", "B")[n % 4], "text": text(n)}
        for n in range(12)
    ]
    found = SectionTask(min_words=1).load(write(tmp_path / "x.jsonl", jsonl(rows)))
    same = {record.id: record.fields["same_section"] for record in found}
    assert same["0"] == same["4"] == ["0", "4", "8"]  # T0, A
    assert same["1"] == same["3"] == ["1", "3", "5", "7", "9", "11"]  # T1, B
    assert "2" not in same and len(same) == 9
    assert [record.id for record in found[1:3]] == ["1", "3"]


def test_a_batch_is_fetched_as_its_records_are_read(tmp_path: Path) -> None:
    found = load_passages(plain(tmp_path), 1, "X.min_words")
    rows = [7, 0, 7, 19]
    assert fetch(found, rows) == fetch(list(found), rows) == [found[row] for row in rows]


def test_no_file_is_left_open(tmp_path: Path) -> None:
    path = plain(tmp_path)

    def handles() -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of the list itself
                count += os.path.samestat(os.fstat(int(name)), path.stat())
        return count

    found = load_passages(path, 1, "X.min_words")
    assert handles() == 1
    part = found[3:]
    del found
    assert len(part) == 17 and part[0].id == "3" and handles() == 1
    del part
    assert handles() == 0
