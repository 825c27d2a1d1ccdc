"""Two processes search an index that has changed as one searches an index made from nothing."""

import random
import shutil
from pathlib import Path

import pytest

import atlas_jax
from tests.test_face import SETTINGS, work  # noqa: F401  (a fixture)
from tests.training.runs import read_lines, write_lines
from tests.training.test_processes import CHILD, begin, finish

# Runs the command several times in one process: once for each set of bindings after the first one.
SEVERAL = CHILD.replace(
    "sys.exit(importlib",
    """
flags = [one for one in sys.argv[3:] if not one.startswith("--gin.SET")]
for more in [one.removeprefix("--gin.SET") for one in sys.argv if one.startswith("--gin.SET")]:
    own = [f"--gin.{binding}" for binding in more.split("|")]
    assert importlib.import_module(f"atlas_jax.{sys.argv[2]}").main([*flags, *own]) == 0
sys.exit(0 and importlib""",
)
State = tuple[Path, Path, str, dict[str, dict[str, str]]]  # store, index, as_of, what it holds


def passage(passage_id: str, words: str) -> dict[str, str]:
    return {"id": passage_id, "title": "T", "section": "", "text": words}


def changed(work: Path) -> list[State]:  # noqa: F811
    """A store after every third of random changes, each made by a command of its own."""
    drawn, model = random.Random(3), work / "model"
    store, index = work / "store", work / "index"
    file, formats = work / "passages.jsonl", SETTINGS["formats"]
    atlas_jax.build_index(model, passages=file, store=store, index=index, formats=formats)
    holds = {row["id"]: row for row in read_lines(file)}
    states: list[State] = []
    for number in range(1, 7):
        some = drawn.sample(sorted(holds), 3)
        add = [passage(f"n{number}{i}", f"the capital {number} {i}") for i in range(number % 3)]
        replace = [passage(some[0], f"people of {number}")]
        delete = some[1 : 1 + drawn.randrange(3)]
        told = {"store": store, "index": index, "add": add, "replace": replace, "delete": delete}
        version = atlas_jax.change_index(model, **told)
        holds = {k: v for k, v in holds.items() if k not in delete}
        holds |= {one["id"]: one for one in (*add, *replace)}
        if number % 3 == 0:
            states.append((store, index, str(version), dict(holds)))
    joined = work / "joined_store", work / "joined_index"
    for old, new in zip((store, index), joined, strict=True):
        shutil.copytree(old, new)
    atlas_jax.compact_index(store=joined[0], index=joined[1])
    return [*states, (*joined, "", dict(holds))]


@pytest.mark.slow
def test_two_processes_find_what_one_finds_in_an_index_from_nothing(work: Path) -> None:  # noqa: F811
    states, settings = changed(work), []
    asked = read_lines(work / "train.jsonl")
    for number, (store, index, as_of, holds) in enumerate(states):
        bound = {
            "CorpusConfig.store": f"'{store}'", "CorpusConfig.index": f"'{index}'",
            "CorpusConfig.as_of": f"'{as_of}'", "RetrieveConfig.k": len(holds),
            "RetrieveConfig.output": f"'{work}/found{number}.jsonl'",
        }  # fmt: skip
        settings.append("SET" + "|".join(f"{name}={value}" for name, value in bound.items()))
    bindings = [
        f"ModelConfig.retriever='{work}/model'", "ModelConfig.retriever_tokenizer=''",
        f"RetrieveConfig.file='{work}/train.jsonl'", "RetrieveConfig.batch_size=4",
        "MeshConfig.data=2", "MeshConfig.fsdp=2", *settings,
    ]  # fmt: skip
    run_gin = work / "run.gin"
    finish(begin("retrieve", str(run_gin), bindings, 2, child=SEVERAL))
    for number, (*_, holds) in enumerate(states):
        anew = write_lines(work / f"anew{number}.jsonl", list(holds.values()))
        atlas = atlas_jax.load(work / "model", passages=anew, **SETTINGS)
        rows = read_lines(work / f"found{number}.jsonl")
        assert [row["id"] for row in rows] == [row["id"] for row in asked]
        for row, one in zip(rows, asked, strict=True):
            expected = {p.id: p for p in atlas.retrieve(one["question"], k=len(holds))}
            assert {p["id"]: p["text"] for p in row["passages"]} == {
                name: p.text for name, p in expected.items()
            }
            scores = {p["id"]: p["score"] for p in row["passages"]}
            assert scores == pytest.approx({k: p.score for k, p in expected.items()}, abs=1e-4)
            ranked = [p["score"] for p in row["passages"]]
            assert ranked == sorted(ranked, reverse=True)
