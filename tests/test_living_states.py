"""A reader that keeps states of the passages, while these change: nothing is stale, none compiled.

The states are compared by passage with those of a store that was built anew.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atlas_jax
from atlas_jax import cli, from_gin
from atlas_jax.answering.asked import Asked
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.programs import Shape
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.reader import fid
from tests.test_face import QUESTIONS, SETTINGS
from tests.test_living_atlas import compiled, everything, passage
from tests.test_living_processes import COMMANDS, begin
from tests.training.runs import read_lines, write_lines, write_run
from tests.training.test_processes import finish

PAIR = {
    "encoder": "'pair'", "num_encoder_layers": 2, "apart_layers": 1, "encoder_mlp_dim": 32,
    "start_id": 2, "pointer": True,
}  # fmt: skip
WIDTH = 16  # of the reader
SHAPE = Shape(rows=8, k=3, explains=False, excluded=1, choices=0)


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    """A folder with passages, a small model with a pair encoder, a store and an index."""
    folder = tmp_path_factory.mktemp("states")
    run = str(write_run(folder, reader_tokenizer_file, retriever_tokenizer_file))
    load_gin([run], [f"ReaderConfig.{name}={value}" for name, value in PAIR.items()])
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assemble(from_gin.models(), mesh, rules)
        export_model(folder / "model", made.models, made.params, made.tokenizers, "float32", {})
    told = {"passages": folder / "passages.jsonl", "formats": SETTINGS["formats"]}
    for name in ("", "2", "3"):
        places = {"store": folder / f"store{name}", "index": folder / f"index{name}"}
        atlas_jax.build_index(folder / "model", **told, **places)
    return folder


def load(work: Path, name: str = "", **more: Any) -> Atlas:
    told = {"store": work / f"store{name}", "index": work / f"index{name}"}
    told |= {"reader_states": work / f"states{name}", **more}
    return atlas_jax.load(work / "model", **told, **SETTINGS)


def states(corpus: Corpus | None) -> dict[str, np.ndarray]:
    """By passage, as they lie on the devices; what stands behind its end is never read."""
    assert corpus is not None and corpus.index is not None and corpus.index.apart_nf is not None
    held_nf, tokens_nl = (
        np.asarray(corpus.index.apart_nf),
        np.asarray(corpus.index.reader_tokens_nl),
    )
    real_n = WIDTH * ((tokens_nl != 0).sum(axis=1) + 2)  # with start and end
    store = corpus.store
    return {store.passage(row)["id"]: held_nf[row, : real_n[row]] for row in range(store.count)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for passage_id, one in expected.items():
        np.testing.assert_allclose(found[passage_id], one, rtol=2e-3, atol=2e-3)


def test_any_changes_bring_their_states_and_compile_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, drawn = read_lines(work / "passages.jsonl"), random.Random(2)
    atlas = load(work)
    wanted = {one["id"]: one for one in rows}
    first = states(atlas._corpus)
    # Compiles what writes rows, and what reads texts of these lengths.
    for one in (passage("n0", "the capital of 9"), passage("n1", "Arvo 9 9")):
        atlas.add_passages([one])
        wanted[one["id"]] = one
    atlas.ask_in(SHAPE, [Asked(QUESTIONS[0])])
    events = compiled()
    for number in range(2, 7):
        some = drawn.sample(sorted(wanted), 3)
        add = [passage(f"n{number}x{i}", f"Arvo {number} {i}") for i in range(1 + number % 3)]
        replace = [passage(some[0], f"the capital of {number}")]
        delete = some[1 : 1 + number % 3]
        atlas.change_passages(add=add, replace=replace, delete=delete)
        wanted = {k: v for k, v in wanted.items() if k not in delete}
        wanted |= {one["id"]: one for one in (*add, *replace)}
        answer = atlas.ask_in(SHAPE, [Asked(QUESTIONS[0])])[0]
    before = atlas.earlier("0")
    as_of = atlas.ask_in(SHAPE, [Asked(one) for one in QUESTIONS], corpus=before)
    assert events == []
    assert_same(states(before), first)
    anew = write_lines(work / "anew.jsonl", list(wanted.values()))
    fresh = {"passages": anew, "reader_states": work / "states_anew"}
    expected = atlas_jax.load(work / "model", **fresh, **SETTINGS)
    assert_same(states(atlas._corpus), states(expected._corpus))
    assert everything(atlas, 10)[0] == everything(expected, 10)[0]
    assert answer.text == expected.ask_in(SHAPE, [Asked(QUESTIONS[0])])[0].text
    # What was kept is read, not computed again.
    monkeypatch.setattr(fid, "encode_apart", None)
    again = load(work)
    assert_same(states(again._corpus), states(atlas._corpus))
    old = load(work, as_of=0)
    assert_same(states(old._corpus), first)
    assert [one.text for one in as_of] == [
        one.text for one in old.ask_in(SHAPE, [Asked(one) for one in QUESTIONS])
    ]


def test_compact_joins_them_and_what_a_command_adds_is_computed_when_it_is_read(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = states(load(work, "2")._corpus)
    told = {"store": work / "store2", "index": work / "index2"}
    new = passage("new", "Arvo has no capital.")
    atlas_jax.change_index(work / "model", add=[new], delete=["p0"], **told)
    loaded = states(load(work, "2")._corpus)
    assert loaded.keys() == first.keys() - {"p0"} | {"new"}
    beside = work / "states2-of-segments"
    (segment,) = beside.iterdir()
    flags = [f"--{name}={place}" for name, place in told.items()]
    flags.append(f"--reader_states={work / 'states2'}")
    assert cli.main(["index", "compact", *flags]) == 0
    assert not segment.exists() and not (work / "states2").exists()
    with monkeypatch.context() as patched:
        patched.setattr(fid, "encode_apart", None)
        joined = load(work, "2")
    assert_same(states(joined._corpus), loaded)
    joined.delete_passages(["new"])
    joined.add_passages([new])
    assert_same(states(joined._corpus), loaded)
    manifest = next(beside.iterdir()) / "states.json"
    manifest.write_text(manifest.read_text().replace('"passages": "', '"passages": "0'))
    with pytest.raises(atlas_jax.UserError, match="was made of another passages"):
        load(work, "2")


@pytest.mark.slow
def test_two_processes_answer_from_kept_states_as_of_each_version(work: Path) -> None:
    store, index = work / "store3", work / "index3"
    lines = write_lines(work / "more.jsonl", [passage(f"m{i}", f"Arvo is {i}") for i in range(5)])
    places = [f"--model={work / 'model'}", f"--store={store}", f"--index={index}"]
    commands = [
        ["index", "add", str(lines), *places],
        ["index", "delete", "p0", f"--store={store}"],
    ]
    for version in (0, 1, 2):
        bound = {
            "INITIAL_CHECKPOINT_PATH": work / "model", "STORE": store, "INDEX": index,
            "EVAL_FILE": work / "train.jsonl", "PREDICTIONS": work / f"answers{version}.jsonl",
            "CorpusConfig.reader_states": work / "states3",
        }  # fmt: skip
        numbers = {
            "MeshConfig.data": 4, "EvalConfig.batch_size": 4, "EvalConfig.recall_at": (1,),
            "StepConfig.k": 3, "StepConfig.reader_length": 112, "DataConfig.query_length": 64,
            "DataConfig.retriever_query_length": 48, "DataConfig.target_length": 8,
            "StoreConfig.reader_length": 48, "StoreConfig.retriever_length": 48,
            "GenerationConfig.max_length": 4,
        }  # fmt: skip
        flags = [f"--gin.{name}='{path}'" for name, path in bound.items()]
        flags += [f"--gin.{name}={number}" for name, number in numbers.items()]
        commands.append(["evaluate", "--gin_file=runs/evaluate.gin", f"--as_of={version}", *flags])
    finish(begin(COMMANDS, {"commands": commands, "code": 0}))
    for version in (0, 1, 2):
        told = {"store": store, "index": index, "as_of": version}
        alone = atlas_jax.load(work / "model", **told, **SETTINGS)
        answers = {one.question: one for one in alone.ask(QUESTIONS)}
        rows = [one for one in read_lines(work / f"answers{version}.jsonl")
                if one["question"] in answers]  # fmt: skip
        assert len(rows) == len(QUESTIONS)
        for row in rows:
            found = answers[row["question"]]
            assert row["prediction"] == found.text
            assert [one["id"] for one in row["passages"]] == [one.id for one in found.passages]
