"""`atlas-jax index add, replace, delete, compact`, and `--as_of`: with a model, as a user does."""

import json
from pathlib import Path
from typing import Any

import pytest

import atlas_jax
from atlas_jax import cli
from tests.test_face import QUESTIONS, SETTINGS, work  # noqa: F401  (a fixture)
from tests.training.runs import read_lines, write_lines

NEW = {"id": "new", "title": "Arvo", "section": "", "text": "The capital of Arvo is Nova."}


@pytest.fixture(scope="module")
def changed(work: Path) -> tuple[Path, Path]:  # noqa: F811
    """Store and index with two versions."""
    store, index = work / "living_store", work / "living_index"
    told = {"store": store, "index": index}
    formats = SETTINGS["formats"]
    atlas_jax.build_index(work / "model", passages=work / "passages.jsonl", formats=formats, **told)
    flags = [f"--model={work / 'model'}", f"--store={store}", f"--index={index}"]
    assert cli.main(["index", "add", str(write_lines(work / "new.jsonl", [NEW])), *flags]) == 0
    other = {**read_lines(work / "passages.jsonl")[2], "text": "Bera has no capital."}
    replaced = atlas_jax.change_index(work / "model", replace=[other], delete=["p0"], **told)
    assert replaced == 2
    return store, index


Passages = tuple[list[tuple[str, str]], list[float]]


def found(work: Path, **told: Any) -> Passages:  # noqa: F811
    """Ids and texts of the best passages, and their scores."""
    atlas = atlas_jax.load(work / "model", **told, **SETTINGS)
    passages = [one for each in atlas.retrieve(QUESTIONS, k=12) for one in each]
    passages.sort(key=lambda one: (one.id, one.score))
    return [(one.id, one.text) for one in passages], [one.score for one in passages]


def alike(some: Passages, others: Passages) -> bool:
    """The same passages, with the same scores up to rounding."""
    return some[0] == others[0] and some[1] == pytest.approx(others[1], abs=1e-4)


def test_diff_tells_which_answers_followed_a_change(
    work: Path,  # noqa: F811
    changed: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, index = changed
    questions = write_lines(
        work / "asked.jsonl", [{"question": one, "answers": ["x"]} for one in QUESTIONS]
    )
    flags = [
        f"--questions={questions}", f"--model={work / 'model'}", f"--store={store}",
        f"--index={index}", "--k=12", f"--output={work / 'diff.jsonl'}",
    ]  # fmt: skip
    assert cli.main(["index", "diff", "0", "0", *flags]) == 0
    assert f"{len(QUESTIONS)} questions: 0 changed, 0 not followed" in capsys.readouterr().out
    assert cli.main(["index", "diff", "1", "2", *flags]) == 0
    out, rows = capsys.readouterr().out, read_lines(work / "diff.jsonl")
    assert [one in row["question"] for one, row in zip(QUESTIONS, rows, strict=True)] == [True] * 2
    assert any(one["gone"] for one in rows)  # 12 of 17 passages are read, so some of what changed
    told = [one["verdict"] for one in rows]
    assert f"{told.count('changed')} changed, {told.count('not followed')} not followed" in out
    assert cli.main(["index", "diff", "1", "9", *flags]) == 2
    assert "version" in capsys.readouterr().err


def test_changes_give_the_answers_of_an_index_built_anew(
    work: Path,  # noqa: F811
    changed: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, index = changed
    rows = read_lines(work / "passages.jsonl")
    other = {**rows[2], "text": "Bera has no capital."}
    states = {
        0: rows,
        1: [*rows, NEW],
        2: [*(one for one in rows if one["id"] not in ("p0", other["id"])), NEW, other],
    }
    for version, passages in states.items():
        anew = write_lines(work / f"state{version}.jsonl", passages)
        expected = found(work, passages=anew)
        assert alike(found(work, store=store, index=index, as_of=version), expected)
    assert alike(found(work, store=store, index=index), expected)
    assert alike(found(work, store=store), expected)  # embedded at the start
    assert cli.main(["index", "compact", f"--store={store}", f"--index={index}", "--keep=1"]) == 0
    assert "version 3" in capsys.readouterr().out
    assert alike(found(work, store=store, index=index), expected)
    assert not (store / "shards").exists() and not (index / "index.json").exists()
    with pytest.raises(atlas_jax.UserError, match="has the versions 3 to 3"):
        atlas_jax.load(work / "model", store=store, as_of=2)
    assert cli.main(["index", "delete", "new", f"--store={store}"]) == 0
    capsys.readouterr()
    assert cli.main(["index", "show", str(store), "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)["versions"]
    assert versions[1]["change"] == {"added": 0, "replaced": 0, "deleted": 1}
    assert [one["version"] for one in versions] == [3, 4]
    assert "new" not in {passage_id for passage_id, _ in found(work, store=store, index=index)[0]}


def test_an_index_that_lacks_a_segment_is_completed_by_build_index(
    work: Path,  # noqa: F811
) -> None:
    store, index = work / "store2", work / "index2"
    told, formats = {"store": store, "index": index}, SETTINGS["formats"]
    atlas_jax.build_index(work / "model", passages=work / "passages.jsonl", formats=formats, **told)
    atlas_jax.change_index(work / "model", store=store, add=[NEW])
    with pytest.raises(atlas_jax.UserError, match="is no index"):
        atlas_jax.load(work / "model", **told)
    count = atlas_jax.build_index(work / "model", formats=formats, **told)
    assert count == len(read_lines(work / "passages.jsonl")) + 1
    assert alike(found(work, **told), found(work, store=store))


def test_retrieve_takes_a_version_by_flag(work: Path, arguments: list[str]) -> None:  # noqa: F811
    folder = Path(arguments[0].partition("=")[2]).parent
    out = folder / "found.jsonl"
    flags = [
        arguments[0],
        f"--gin.RetrieveConfig.file={folder / 'test.jsonl'}",
        f"--gin.RetrieveConfig.output={out}",
        "--gin.RetrieveConfig.k=3",
    ]
    assert cli.main(["retrieve", *flags]) == 0
    first = out.read_text()
    best = read_lines(out)[0]["passages"][0]["id"]
    assert cli.main(["index", "delete", best, f"--store={folder / 'store'}"]) == 0
    assert cli.main(["retrieve", *flags]) == 0
    assert best not in {p["id"] for row in read_lines(out) for p in row["passages"]}
    assert cli.main(["retrieve", "--as_of=0", *flags]) == 0
    assert out.read_text() == first
