"""Passages that change while they are searched: at once, without compiling, never by half."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import atlas_jax
from atlas_jax.answering.atlas import Atlas
from atlas_jax.index.hot import moved, moves
from tests.test_face import QUESTIONS, SETTINGS, work  # noqa: F401  (a fixture)
from tests.training.runs import read_lines, write_lines

ROOT = Path(__file__).parents[1]


def passage(passage_id: str, text: str) -> dict[str, str]:
    return {"id": passage_id, "title": "T", "section": "", "text": text}


def everything(atlas: Atlas, k: int) -> tuple[list[tuple[str, str]], list[float]]:
    found = [one for each in atlas.retrieve(QUESTIONS, k=k) for one in each]
    found.sort(key=lambda one: (one.id, one.score))
    return [(one.id, one.text) for one in found], [one.score for one in found]


def compiled() -> list[str]:
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: events.append(event) if "compile" in event else None
    )
    return events


# One device finds the same and compiles nothing either.
ALONE = """
import pathlib, sys
import jax
from tests import test_living_atlas
assert jax.device_count() == 1
test_living_atlas.test_any_changes_are_seen_at_once_and_compile_nothing(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize(("count", "gone", "fresh"), [
    (5, [], 2), (5, [1, 4], 0), (5, [0, 1, 2, 3], 0), (5, [4], 1), (6, [3, 5], 1), (3, [2, 0], 4),
])  # fmt: skip
def test_living_rows_stay_together(count: int, gone: list[int], fresh: int) -> None:
    plan = moves(count, np.array(gone, np.int64), fresh)
    rows = moved(np.arange(count), 100 + np.arange(fresh), plan).tolist()
    kept = set(range(count)) - set(gone)
    assert len(rows) == plan.count and set(rows) == kept | {100 + i for i in range(fresh)}
    # Nothing is written over that is still to be read.
    assert not set(plan.rows_w.tolist()) & set(plan.kept_w.tolist())


def test_any_changes_are_seen_at_once_and_compile_nothing(work: Path) -> None:  # noqa: F811
    rows, drawn = read_lines(work / "passages.jsonl"), random.Random(1)
    atlas = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)
    wanted = {one["id"]: one for one in rows}
    atlas.add_passages([passage("n0", "the capital of")])  # compiles what writes rows
    atlas.retrieve(QUESTIONS, k=10)
    wanted["n0"] = passage("n0", "the capital of")
    events = compiled()
    for number in range(1, 9):
        some = drawn.sample(sorted(wanted), 3)
        add = [passage(f"n{number}x{i}", "the capital of") for i in range(drawn.randrange(4))]
        replace = [passage(some[0], "the capital of")] if number % 2 else []
        delete = some[1 : 1 + number % 3]
        if not (add or replace or delete):
            continue
        before = atlas.passages_version
        assert atlas.change_passages(add=add, replace=replace, delete=delete) == before + 1
        wanted = {k: v for k, v in wanted.items() if k not in delete}
        wanted |= {one["id"]: one for one in (*add, *replace)}
        assert atlas.store is not None and atlas.store.count == len(wanted)
        found = everything(atlas, 10)
        assert not {passage_id for passage_id, _ in found[0]} & set(delete)
        assert all(wanted[passage_id]["text"] == text for passage_id, text in found[0])
    assert events == []
    anew = write_lines(work / "hot.jsonl", list(wanted.values()))
    expected = atlas_jax.load(work / "model", passages=anew, **SETTINGS)
    k = len(wanted)
    found, same = everything(atlas, k), everything(expected, k)
    assert found[0] == same[0] and found[1] == pytest.approx(same[1], abs=1e-4)
    first = atlas.ask(QUESTIONS[0], explain=True, exclude=[found[0][0][0]])
    assert first.text == expected.ask(QUESTIONS[0], explain=True, exclude=[found[0][0][0]]).text


@pytest.mark.slow
def test_changes_on_one_device(work: Path) -> None:  # noqa: F811
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(
        [sys.executable, "-c", ALONE, str(work)], check=True, env=environment, cwd=ROOT, text=True
    )


def test_a_full_index_grows_and_int8_rows_move_as_they_are(
    work: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: dict[str, Any] = {"store": work / "hot_store", "index": work / "hot_index"}
    model, formats = work / "model", SETTINGS["formats"]
    file = work / "passages.jsonl"
    atlas_jax.build_index(model, passages=file, dtype="int8", formats=formats, **told)
    atlas = atlas_jax.load(model, **told, **SETTINGS)
    many = [passage(f"m{i}", f"text {i}") for i in range(1100)]  # more than 8 devices x 128
    assert atlas.add_passages(many) == 1
    assert "they grow by a factor of 1.5" in capsys.readouterr().err
    assert atlas.delete_passages([f"m{i}" for i in range(0, 1100, 2)]) == 2
    assert atlas.replace_passages([passage("m1", QUESTIONS[0])]) == 3
    found = everything(atlas, 20)
    same = everything(atlas_jax.load(model, **told, **SETTINGS), 20)
    assert found[0] == same[0] and found[1] == pytest.approx(same[1], abs=1e-4)
    assert everything(atlas_jax.load(model, as_of=0, **told, **SETTINGS), 3)[0]


def test_room_is_made_in_the_background_before_it_is_needed(
    work: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    atlas = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)
    atlas.ask(QUESTIONS[0])
    everything(atlas, 10)
    assert atlas._corpus is not None and atlas._corpus.capacity == 1024  # 8 devices x 128
    atlas.add_passages([passage("m0", "text 0")])  # a program of their own embeds few
    atlas.add_passages([passage(f"m{i}", f"text {i % 10}") for i in range(1, 930)])
    told = "946 of 1,024 rows on the devices are in use; room for 2,048 is made in the background"
    assert told in capsys.readouterr().err
    everything(atlas, 10)  # meanwhile
    assert atlas._changes is not None
    atlas._changes.growth.wait()
    assert atlas._corpus.capacity == 2048
    events = compiled()
    atlas.add_passages([passage(f"n{i}", f"text {i % 10}") for i in range(100)])
    atlas.replace_passages([passage("m1", "text 5")])
    answer, found = atlas.ask(QUESTIONS[0]), everything(atlas, 10)
    assert events == [] and "rows on the devices" not in capsys.readouterr().err
    store = atlas.store
    assert store is not None and store.count == 1046
    again = atlas_jax.load(work / "model", store=store.directory, **SETTINGS)
    same = everything(again, 10)
    assert found[0] == same[0] and found[1] == pytest.approx(same[1], abs=1e-4)
    assert answer.text == again.ask(QUESTIONS[0]).text


def test_what_is_at_fault_changes_nothing(work: Path) -> None:  # noqa: F811
    store = work / "fault_store"
    atlas = atlas_jax.load(
        work / "model", passages=work / "passages.jsonl", store=store, **SETTINGS
    )
    before = everything(atlas, 10)
    with pytest.raises(atlas_jax.UserError, match="has no passage with the id 'nobody'"):
        atlas.delete_passages(["nobody"])
    assert everything(atlas, 10) == before and atlas.passages_version == 0
    assert atlas_jax.change_index(store=store, delete=["p0"]) == 1
    with pytest.raises(atlas_jax.UserError, match="is at version 1, but version 0 is loaded"):
        atlas.delete_passages(["p1"])
    assert everything(atlas, 10) == before
    closed = atlas_jax.load(work / "model", **{k: v for k, v in SETTINGS.items() if k != "formats"})
    with pytest.raises(atlas_jax.UserError, match="there is no corpus to change"):
        closed.delete_passages(["p0"])


def test_a_question_never_sees_half_of_a_version(work: Path) -> None:  # noqa: F811
    atlas = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)
    pair = [passage(f"half{i}", "edition 0") for i in range(2)]
    atlas.add_passages(pair)
    count = atlas.store.count if atlas.store else 0
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            found = {one.id: one.text for one in atlas.retrieve(QUESTIONS[0], k=count)}
            seen.append({found["half0"], found["half1"]})

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for edition in range(1, 9):
        atlas.replace_passages([{**one, "text": f"edition {edition}"} for one in pair])
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert len(seen) > 4 and all(len(texts) == 1 for texts in seen)
    assert {one.text for one in atlas.retrieve(QUESTIONS[0], k=count) if "half" in one.id} == {
        "edition 8"
    }
