"""A saved index is described without the model that made it."""

import json

import numpy as np
import pytest

from atlas_jax import cli
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.inspection import describe
from atlas_jax.index.int8 import stored_as
from atlas_jax.index.new_index import save_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.recall_notes import RecallNote, note_recall
from atlas_jax.index.saved import open_index
from atlas_jax.index.store_files import StoreConfig

# Lengths 5, 1 and 13.
ROWS = np.array([[3, 4, 0], [0, 0, 1], [0, 12, 5]], np.float32)


@pytest.fixture
def stores(tmp_path, reader_tokenizer_file, retriever_tokenizer_file):
    made = []
    for name in ("store", "other"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"id": f"p{i}", "title": "T", "text": f"{name} {i}"} for i in range(len(ROWS))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizers = map(Tokenizer.from_file, (reader_tokenizer_file, retriever_tokenizer_file))
        lengths = StoreConfig(reader_length=30, retriever_length=16)
        made.append(PassageStore.build(path, tmp_path / name, *tokenizers, lengths, progress=False))
    return made


def test_an_index_says_what_it_holds(stores, tmp_path):
    save_index(tmp_path / "index", ROWS, stores[0], "abc", version=2)
    found = describe(tmp_path / "index", tmp_path / "store")
    assert found == {
        "index": str(tmp_path / "index"), "count": 3, "width": 3, "dtype": "float32", "version": 2,
        "encoder_hash": "abc", "store_hash": stores[0].retriever_hash, "bytes": 3 * 3 * 4,
        "store": str(tmp_path / "store"), "norms": pytest.approx([1, 19 / 3, 13]),
        "not_finite": [], "not_finite_count": 0, "recall": [],
    }  # fmt: skip
    np.testing.assert_array_equal(open_index(tmp_path / "index").embeddings_ne, ROWS)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 3 * 3 * 2), ("int8", 3 * 3 + 3 * 4)])
def test_rounded_rows_have_their_lengths(stores, tmp_path, dtype, size):
    save_index(tmp_path / "index", stored_as(ROWS, dtype), stores[0], "abc")
    found = describe(tmp_path / "index")
    assert (found["dtype"], found["bytes"]) == (dtype, size)
    assert found["norms"] == pytest.approx([1, 19 / 3, 13], rel=0.01)
    assert "store" not in found


def test_rows_that_are_not_finite_are_named(stores, tmp_path):
    broken = ROWS.copy()
    broken[1, 2] = np.nan
    save_index(tmp_path / "index", broken, stores[0], "abc")
    found = describe(tmp_path / "index")
    assert (found["not_finite"], found["not_finite_count"]) == ([1], 1)
    assert found["norms"] == pytest.approx([5, 9, 13])


def test_the_command_shows_it(stores, tmp_path, capsys):
    save_index(tmp_path / "index", ROWS, stores[0], "0123456789abcdef", version=2)
    index, store = str(tmp_path / "index"), tmp_path / "store"
    assert cli.main(["index", "show", index, f"--store={store}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{index}: 3 passages, 3 numbers each, float32, 0.0 MiB",
        "refreshed 2 times",
        f"passage encoder 0123456789ab, passages {stores[0].retriever_hash[:12]}: those of {store}",
        "lengths of the embeddings: 1 to 13, mean 6.333",
    ]
    assert cli.main(["index", "show", index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 3


def test_the_recall_that_runs_found_is_shown_until_the_index_is_made_anew(stores, tmp_path, capsys):
    index = tmp_path / "index"
    save_index(index, ROWS, stores[0], "abc")
    note = RecallNote(
        search={"searcher": "exact", "recall_target": 0.9}, encoder_hash="abc", k=5, recall=0.5,
        low=0.4, high=0.6, questions=90, passages_version=3, time="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    note_recall(index, note)
    note_recall(index, {**note, "k": 20})
    note_recall(index, {**note, "recall": 0.75, "high": 0.8})
    assert cli.main(["index", "show", str(index)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"recall@{k} of exact, recall_target 0.9: {told} with 95 % confidence, 90 questions, "
        "version 3, 2026-01-02T03:04:05Z)"
        for k, told in ((20, "0.500 (0.400 to 0.600"), (5, "0.750 (0.400 to 0.800"))
    ]
    (index / "recall.json").write_text("[{}]")
    with pytest.raises(UserError, match="recall.json"):
        describe(index)
    note_recall(tmp_path, note)
    (tmp_path / "recall.json").replace(index / "recall.json")
    for path in index.glob("*index.json"):
        path.write_text(path.read_text().replace('"abc"', '"other"'))
    assert describe(index)["recall"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "INDEX", "--store=OTHER"], "was made from other passages"),
        (["show", "OTHER.jsonl"], "other.jsonl is no index"),
        (["shwo"], "no subcommand shwo; did you mean show?"),
    ],
)
def test_a_slip_is_one_line(stores, tmp_path, arguments, message, capsys):
    save_index(tmp_path / "index", ROWS, stores[0], "abc")
    places = {"INDEX": str(tmp_path / "index"), "OTHER": str(tmp_path / "other")}
    for name, path in places.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert cli.main(["index", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_array_is_named(stores, tmp_path):
    save_index(tmp_path / "index", ROWS, stores[0], "abc")
    (array,) = (tmp_path / "index").glob("*/rows/c/0/0")
    array.write_bytes(array.read_bytes()[:20])
    with pytest.raises(UserError, match="rows/c/0/0: it has 20 bytes"):
        describe(tmp_path / "index")
