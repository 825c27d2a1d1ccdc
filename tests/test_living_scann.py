"""Passages that change while ScaNN searches them: what is new is found, what is deleted never."""

import dataclasses
import random
from pathlib import Path

import pytest

import atlas_jax
from atlas_jax.answering.asked import Asked
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.programs import Shape
from atlas_jax.index.scann_index import ScannConfig
from tests.test_face import QUESTIONS, SETTINGS, work  # noqa: F401  (a fixture)
from tests.test_living_atlas import compiled, everything, passage
from tests.training.runs import read_lines, write_lines

pytest.importorskip("scann", reason="needs ScaNN")
SHAPE = Shape(rows=8, k=3)


def load(work: Path, index: str, hash_from: int, **told: str | int) -> Atlas:  # noqa: F811
    places = {"store": work / f"{index}_store", "index": work / index}
    run = atlas_jax.load(work / "model", **places, **told, **SETTINGS).told
    config = dataclasses.replace(run.corpus.config, searcher="scann")
    scann = ScannConfig(hash_from=hash_from)
    corpus = dataclasses.replace(run.corpus, config=config, scann=scann)
    return Atlas(dataclasses.replace(run, corpus=corpus))


@pytest.mark.parametrize("hash_from", [1000, 4], ids=["exact", "hashed"])
def test_any_changes_give_what_a_corpus_built_anew_gives(
    work: Path,  # noqa: F811
    hash_from: int,
) -> None:
    rows, drawn = read_lines(work / "passages.jsonl"), random.Random(3)
    index = f"scann{hash_from}"
    told = {"store": work / f"{index}_store", "index": work / index}
    passages = work / "passages.jsonl"
    atlas_jax.build_index(work / "model", passages=passages, formats=SETTINGS["formats"], **told)
    atlas = load(work, index, hash_from)
    wanted = {one["id"]: one for one in rows}
    first = everything(atlas, len(rows))
    atlas.add_passages([passage("n0", "the capital of")])  # compiles what embeds few
    wanted["n0"] = passage("n0", "the capital of")
    atlas.ask_in(SHAPE, [Asked(QUESTIONS[0])])
    events = compiled()
    for number in range(1, 5):
        some = drawn.sample(sorted(wanted), 3)
        add = [passage(f"n{number}x{i}", "the capital of") for i in range(drawn.randrange(4))]
        replace, delete = [passage(some[0], "the capital of")], some[1 : 1 + number % 3]
        atlas.change_passages(add=add, replace=replace, delete=delete)
        wanted = {k: v for k, v in wanted.items() if k not in delete}
        wanted |= {one["id"]: one for one in (*add, *replace)}
        answer = atlas.ask_in(SHAPE, [Asked(QUESTIONS[0])])[0]
        assert all(wanted[one.id]["text"] == one.text for one in answer.passages)
    before = atlas.earlier("0")
    old = atlas.ask_in(SHAPE, [Asked(QUESTIONS[0])], corpus=before)[0]
    assert events == []
    # All passages are asked for, so that the hashed search, too, has to find each.
    found = everything(atlas, len(wanted))
    anew = write_lines(work / f"{index}.jsonl", list(wanted.values()))
    expected = everything(atlas_jax.load(work / "model", passages=anew, **SETTINGS), len(wanted))
    assert found[0] == expected[0] and found[1] == pytest.approx(expected[1], abs=1e-3)
    again = everything(load(work, index, hash_from), len(wanted))
    assert again[0] == found[0] and again[1] == pytest.approx(found[1], abs=1e-4)
    then = load(work, index, hash_from, as_of=0)
    assert everything(then, len(rows))[0] == first[0]
    if hash_from == 1000:
        assert old.text == then.ask_in(SHAPE, [Asked(QUESTIONS[0])])[0].text


def test_an_index_that_is_not_saved_cannot_change(work: Path) -> None:  # noqa: F811
    run = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS).told
    config = dataclasses.replace(run.corpus.config, searcher="scann")
    atlas = Atlas(dataclasses.replace(run, corpus=dataclasses.replace(run.corpus, config=config)))
    with pytest.raises(atlas_jax.UserError, match="can change only an index that is saved"):
        atlas.delete_passages(["p0"])
    with pytest.raises(atlas_jax.UserError, match="are not saved"):
        atlas.earlier("0")
