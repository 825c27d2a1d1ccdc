"""Data files of well-known collections are read as they are published."""

import csv
import gzip
import io
import json

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.layouts import PASSAGES, QUESTIONS, read_layout
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.qa import QATask


@pytest.fixture(scope="module")
def tokenizers(reader_tokenizer_file, retriever_tokenizer_file):
    return [Tokenizer.from_file(f) for f in (reader_tokenizer_file, retriever_tokenizer_file)]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def table(path, *rows):
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    data = text.getvalue().encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


SQUAD = [
    {
        "id": "57", "title": "Arvo", "context": "The capital of Arvo is Lindel.",
        "question": "What is the capital of Arvo?",
        "answers": {"text": ["Lindel", "Lindel", "the city of Lindel"], "answer_start": [23, 23]},
    },
    {
        "id": "58", "title": "Arvo", "context": "The capital of Arvo is Lindel.",
        "question": "Of what is Lindel the capital?",
        "answers": {"text": ["Arvo"], "answer_start": [15]},
    },
]  # fmt: skip


@pytest.fixture
def passage_files(tmp_path):
    """The same passage in each layout, by the layout's name."""
    text, title = "The capital is Lindel.", "Arvo"
    return {
        "atlas-jax": jsonl(tmp_path / "own.jsonl", {"id": 7, "title": title, "text": text}),
        "BEIR": jsonl(
            tmp_path / "beir.jsonl", {"_id": "7", "title": title, "text": text, "metadata": {}}
        ),
        "FlashRAG": jsonl(
            tmp_path / "flashrag.jsonl", {"id": "7", "contents": f'"{title}"\n{text}'}
        ),
        "DPR tsv": table(tmp_path / "psgs.tsv", ("id", "text", "title"), ("7", text, title)),
    }


@pytest.mark.parametrize("name", ["atlas-jax", "BEIR", "FlashRAG", "DPR tsv"])
def test_passages_are_read_in_each_layout(passage_files, name, capsys):
    ((line, record),) = read_layout(passage_files[name], PASSAGES)
    assert line == (2 if name == "DPR tsv" else 1)
    found = {field: str(record[field]) for field in ("id", "title", "text")}
    assert found == {"id": "7", "title": "Arvo", "text": "The capital is Lindel."}
    told = capsys.readouterr().err
    assert told.count("\n") == (name != "atlas-jax") and (name in told) == (name != "atlas-jax")


def test_a_store_holds_the_same_whatever_the_layout(passage_files, tokenizers, tmp_path):
    stores = [
        PassageStore.build(file, tmp_path / f"store {name}", *tokenizers, progress=False)
        for name, file in passage_files.items()
    ]
    assert len({store.content_hash for store in stores}) == 1


def test_a_context_of_squad_is_one_passage_and_the_gold_one_of_its_questions(tmp_path, tokenizers):
    path = jsonl(tmp_path / "squad.jsonl", *SQUAD)
    store = PassageStore.build(path, tmp_path / "store", *tokenizers, progress=False)
    assert store.count == 1
    assert store.passage(0)["text"] == "The capital of Arvo is Lindel."
    examples = [QATask().example(record) for record in QATask().load(path)]
    assert [example.id for example in examples] == ["57", "58"]
    assert examples[0].answers == ("Lindel", "the city of Lindel")
    assert {store.row_of(example.gold_ids[0]) for example in examples} == {0}
    assert examples[1].given_passages[0]["text"] == "The capital of Arvo is Lindel."


@pytest.mark.parametrize("name", ["squad.tsv", "nq-test.qa.csv", "nq.tsv.gz"])
def test_questions_of_dpr(tmp_path, name):
    rows = [("who leads Arvo", '["Ann", "Ann Ro"]'), ('who said "no"', "['It isn\\'t']")]
    records = QATask().load(table(tmp_path / name, *rows))
    assert [record.fields["question"] for record in records] == ["who leads Arvo", 'who said "no"']
    assert [record.fields["answers"] for record in records] == [["Ann", "Ann Ro"], ["It isn't"]]


def test_questions_of_flashrag_and_beir(tmp_path):
    asked = {"id": "test_0", "question": "who leads Arvo", "golden_answers": ["Ann"]}
    (record,) = QATask().load(jsonl(tmp_path / "nq.jsonl", {**asked, "metadata": {"a": 1}}))
    assert (record.id, record.fields["answers"]) == ("test_0", ["Ann"])
    assert record.meta == {"metadata": {"a": 1}}
    path = jsonl(tmp_path / "queries.jsonl", {"_id": "q1", "text": "who leads Arvo"})
    (record,) = QATask().load(path, need_targets=False)
    assert (record.id, record.fields["question"]) == ("q1", "who leads Arvo")
    with pytest.raises(UserError, match=r"queries.jsonl:1: fields 'answers' and 'target' give no"):
        QATask().load(path)


def test_a_title_is_optional(tmp_path, tokenizers):
    path = jsonl(tmp_path / "p.jsonl", {"id": 1, "text": "The capital of Arvo is Lindel ."})
    store = PassageStore.build(path, tmp_path / "store", *tokenizers, progress=False)
    assert store.passage(0) == {
        "id": "1", "title": "", "section": "", "text": "The capital of Arvo is Lindel ."
    }  # fmt: skip
    (record,) = MLMTask(min_words=2).load(path)
    assert MLMTask(min_words=2).example(record).meta == {"title": ""}


def test_a_file_with_our_fields_is_ours(tmp_path, capsys):
    """Whatever else it has: an export of a data base may well have an `_id`."""
    record = {
        "_id": "x",
        "id": "a",
        "text": "one",
        "contents": "two",
        "context": "",
        "question": "",
    }
    ((_, found),) = read_layout(jsonl(tmp_path / "p.jsonl", record), PASSAGES)
    assert (found["id"], found["text"]) == ("a", "one")
    record = {"_id": "x", "text": "three", "question": "one", "answers": [], "golden_answers": []}
    ((_, found),) = read_layout(jsonl(tmp_path / "q.jsonl", record), QUESTIONS)
    assert found["question"] == "one"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"body": "x"}', r"p.jsonl:1: field 'id' is missing; the record has 'body'"),
        (
            "p.jsonl",
            '{"_id": "a", "text": "x"}\n{"_id": "b", "title": "y"}',
            r"p.jsonl:2: field 'text' is missing",
        ),
        (
            "p.jsonl",
            '{"id": "a", "contents": "x"}\n\n{"id": "b", "contents": " "}',
            r"p.jsonl:3: field 'contents' is empty",
        ),
        (
            "p.jsonl",
            '{"id": "a", "contents": "x"}\n{"id": "b", "contents": 3}',
            r"p.jsonl:2: field 'contents' must be a string",
        ),
        ("p.tsv", "id\ttext\ttitle\na\tx", r"p.tsv:2: a row of 2 values, .* 3 were expected: id"),
        ("p.tsv", "number\ttext\n1\tx", r"p.tsv:2: field 'id' is missing"),
        ("p.tsv", 'id\ttext\na\t"x\ny', r"p.tsv:3: no row of tab-separated values"),
        ("p.tsv", 'id\ttext\na\t"x\ny"\nb\t\n', r"p.tsv:4: field 'text' is empty"),
        ("p.tsv", "id\ttext\n", "holds no passages"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, tokenizers, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        PassageStore.build(path, tmp_path / "store", *tokenizers, progress=False)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.tsv", "who\tAnn", r"q.tsv:1: field 'answers' must be a list such as .* but is 'Ann'"),
        ("q.tsv", "who\n", r"q.tsv:1: a row of 1 values, .* 2 were expected: question, answers"),
        (
            "q.jsonl",
            '{"question": "who", "golden_answers": ["Ann"]}\n{"question": "who", "answers": []}',
            r"q.jsonl:2: field 'golden_answers' is missing",
        ),
        (
            "q.jsonl",
            '{"question": "who", "context": "x", "answers": {"start": [1]}}',
            r"q.jsonl:1: field 'answers': field 'text' is missing",
        ),
    ],
)
def test_errors_of_questions_name_file_line_and_field(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        QATask().load(path)


def test_broken_rows_of_a_table_can_be_skipped(tmp_path, capsys):
    path = tmp_path / "q.tsv"
    path.write_text("who\t['Ann']\nwhere\nwhat\t['x']\n")
    found = QATask().load(path, rows=RowsConfig(skip_broken=True))
    assert [r.fields["question"] for r in found] == ["who", "what"]
    assert "q.tsv:2: a row of 1 values" in capsys.readouterr().err
