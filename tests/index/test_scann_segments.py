"""ScaNN's index on disk: used again, built anew where it must be, by segment, and merged."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from atlas_jax import cli
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import NO_ROW
from atlas_jax.index.changes import Batch, change
from atlas_jax.index.int8 import stored_as
from atlas_jax.index.living import LivingStore
from atlas_jax.index.new_index import new_index, save_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.scann_index import MANIFEST, ScannConfig, ScannIndex
from atlas_jax.index.scann_segments import scann_in_memory, scann_of_segments
from atlas_jax.index.segment_indices import folder_of, load_embeddings
from tests.index.flat_store import write_flat_index
from tests.index.test_living import built, text_of, towers  # noqa: F401

pytest.importorskip("scann")
WIDTH, K = 16, 6
# Compressed from 40 rows on; all that is found is rescored, so results are exact.
CONFIG = ScannConfig(hash_from=40, tree_from=60, leaves_searched=1.0, rescored=500)
ON_DISK = dataclasses.replace(CONFIG, rows="disk")


def embedded(store: PassageStore, dtype: str = "float32") -> np.ndarray:
    seeds = [int(store.passage(row)["text"].split()[-1]) for row in range(store.count)]
    rows = [np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds]
    return stored_as(np.asarray(rows, np.float32), dtype)


@pytest.fixture
def corpus(tmp_path, towers):  # noqa: F811
    """A store of 80 passages and its index."""
    directory = built(tmp_path, [text_of(f"p{i}", f"word {i}") for i in range(80)], towers)
    store = LivingStore.as_of(directory)
    save_index(tmp_path / "index", embedded(store), store, "e")
    return tmp_path / "index", store


def searcher(index, store, config=CONFIG):
    embeddings = load_embeddings(index, store, "e").embeddings_ne
    return scann_of_segments(index, store, embeddings, config), np.asarray(embeddings, np.float32)


def queries(count=5):
    return np.random.default_rng(9).standard_normal((count, WIDTH)).astype(np.float32)


def check_exact(found, rows_ne, excluded_bx=None, k=K):
    scores_bn = queries() @ rows_ne.T
    if excluded_bx is not None:
        np.put_along_axis(scores_bn, excluded_bx, -np.inf, axis=1)
    np.testing.assert_array_equal(found.rows_bk, np.argsort(-scores_bn, axis=1)[:, :k])
    real = np.take_along_axis(scores_bn, found.rows_bk, axis=1)
    np.testing.assert_allclose(found.scores_bk, real, rtol=1e-4)


def never(*args):
    raise AssertionError("it is built again")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "format 1"])
def test_what_was_saved_is_loaded_and_finds_the_same(corpus, kind, monkeypatch):
    index, store = corpus
    save_index(index, embedded(store, "bfloat16" if kind == "bfloat16" else "float32"), store, "e")
    if kind == "format 1":
        index = write_flat_index(index, index.with_name("flat"))
    made, rows_ne = searcher(index, store)
    (folder,) = index.glob("*.scann")
    names = {path.name for path in folder.iterdir()}
    # In float32 an index of format 1 has a file that ScaNN can read the rows from.
    assert ("dataset.npy" in names) == (kind != "format 1")
    monkeypatch.setattr(ScannIndex, "made", never)
    loaded, _ = searcher(index, store)
    assert [part.index.kind for part in loaded.parts] == ["tree, hashed"]
    assert loaded.is_approximate
    first, again = (one.search(queries(), K) for one in (made, loaded))
    np.testing.assert_array_equal(first.rows_bk, again.rows_bk)
    np.testing.assert_array_equal(first.scores_bk, again.scores_bk)
    check_exact(again, rows_ne)


def test_what_is_stale_or_damaged_is_built_anew(corpus, capsys):
    index, store = corpus
    _, rows_ne = searcher(index, store)
    (folder,) = index.glob("*.scann")
    files = sorted(path.name for path in folder.iterdir())
    assert MANIFEST in files and len(files) == 8
    for name in files:
        whole = (folder / name).read_bytes()
        for content in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
            (folder / name).write_bytes(content)
            found, _ = searcher(index, store)
            check_exact(found.search(queries(), K), rows_ne)
            said = capsys.readouterr().err
            assert "ScaNN's index is built anew" in said and str(folder) in said, name
            whole = (folder / name).read_bytes()
    (folder / "serialized_partitioner.pb").unlink()
    searcher(index, store)
    assert "its files are not those that manifest.json names" in capsys.readouterr().err
    # ScaNN would unpickle this file.
    (folder / "scann_docids.pkl").write_bytes(b"cos\nabort\n(tR.")
    searcher(index, store)
    assert "its files are not those that manifest.json names" in capsys.readouterr().err
    other = ScannConfig(hash_from=40, tree_from=60, hash_threshold=0.1)
    searcher(index, store, other)
    assert "was built in another way" in capsys.readouterr().err
    searcher(index, store, other)
    assert capsys.readouterr().err == ""


def test_another_version_of_scann_builds_anew(corpus, capsys):
    index, store = corpus
    searcher(index, store)
    (path,) = index.glob(f"*.scann/{MANIFEST}")
    manifest = json.loads(path.read_text())
    manifest["build"]["scann"] = "1.0"
    path.write_text(json.dumps(manifest))
    searcher(index, store)
    assert "was built in another way" in capsys.readouterr().err


def test_a_new_index_takes_the_old_ones_away(corpus):
    index, store = corpus
    searcher(index, store)
    (old,) = index.glob("*.scann")
    (index / f".{old.name}.partial").mkdir()  # of a kill while it was written
    with new_index(index, store, "e", WIDTH) as rows:
        rows[:] = embedded(store)
    assert not list(index.glob("*scann*")) and not list(index.glob(".*partial"))
    searcher(index, store)
    assert [path.name for path in index.glob("*.scann")] != [old.name]


def test_a_folder_that_cannot_be_written_is_searched_all_the_same(corpus, capsys, monkeypatch):
    index, store = corpus

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ScannIndex, "save", full)
    found, rows_ne = searcher(index, store)
    check_exact(found.search(queries(), K), rows_ne)
    assert "No space left on device; ScaNN's index is built at each start" in (
        capsys.readouterr().err
    )
    assert not list(index.glob("*.scann"))


def changed(index: Path, store: LivingStore, towers) -> LivingStore:  # noqa: F811
    """Half of the passages go, three come one by one, and fifty at once."""

    def embed(name, segment, now):
        save_index(folder_of(index, segment, name), embedded(segment), segment, "e")

    batches = [Batch(delete=[f"p{i}" for i in range(0, 80, 2)])]
    batches += [Batch(add=[text_of(f"n{i}", f"new {100 + i}")]) for i in range(3)]
    batches += [Batch(add=[text_of(f"m{i}", f"many {200 + i}") for i in range(50)])]
    for batch in batches:
        store = change(store.directory, batch, towers, embed)
    return store


@pytest.mark.parametrize("config", [CONFIG, ON_DISK], ids=["memory", "disk"])
def test_segments_are_searched_and_merged_without_their_deleted_rows(
    corpus,
    towers,  # noqa: F811
    monkeypatch,
    config,
):
    index, store = corpus
    searcher(index, store, config)
    store = changed(index, store, towers)
    found, rows_ne = searcher(index, store, config)
    assert len(rows_ne) == store.count == 93
    # Of the large segments each has its own; the three small ones are searched together.
    assert sorted(part.index.kind for part in found.parts) == [
        "brute force", "hashed", "tree, hashed",
    ]  # fmt: skip
    assert len(list(index.rglob("*.scann"))) == 2
    check_exact(found.search(queries(), K), rows_ne)
    check_exact(found.search(queries(), 93), rows_ne, k=93)
    excluded_bx = found.search(queries(), 4).rows_bk
    check_exact(found.search(queries(), K, excluded_bx), rows_ne, excluded_bx)

    places = [f"--store={store.directory}", f"--index={index}"]
    told = [f"--gin.ScannConfig.{name}={value!r}" for name, value in vars(config).items()]
    assert cli.main(["index", "compact", *places, *told]) == 0
    merged = LivingStore.as_of(store.directory)
    (folder,) = index.rglob("*.scann")
    assert folder.parent.name == merged.version["segments"][0]
    monkeypatch.setattr(ScannIndex, "made", never)
    again, rows_ne = searcher(index, merged, config)
    assert [part.index.kind for part in again.parts] == ["tree, hashed"]
    check_exact(again.search(queries(), K), rows_ne)


def test_of_rows_on_the_disk_only_those_are_read_that_are_rescored(corpus, monkeypatch):
    index, store = corpus
    few = dataclasses.replace(ON_DISK, rescored=1)
    found, rows_ne = searcher(index, store, few)
    (part,) = found.parts

    class Spied:
        read: list[np.ndarray] = []

        def __getitem__(self, at):
            self.read.append(at)
            return rows_ne[at]

    monkeypatch.setattr(part.index, "_rows_ne", Spied())
    got = found.search(queries(), 2)
    # Twelve, since one more may be excluded: four times as many as are wanted of each query.
    assert [len(at) for at in Spied.read] == [12] * 5
    real = np.take_along_axis(queries() @ rows_ne.T, got.rows_bk, axis=1)
    np.testing.assert_allclose(got.scores_bk, real, rtol=1e-4)
    assert not list(index.rglob("dataset.npy"))
    monkeypatch.setattr(ScannIndex, "made", never)
    again, _ = searcher(index, store, few)  # from the files
    np.testing.assert_array_equal(again.search(queries(), 2).rows_bk, got.rows_bk)
    with pytest.raises(UserError, match="CorpusConfig.index"):
        scann_in_memory(rows_ne, ON_DISK)


def test_a_segment_whose_best_rows_are_all_deleted(tmp_path, towers):  # noqa: F811
    """The 20 best of 80 rows go: the first search, of 15, finds nobody."""
    directory = built(tmp_path, [text_of(f"p{i}", f"word {i}") for i in range(80)], towers)
    store, index = LivingStore.as_of(directory), tmp_path / "index"
    rows = np.arange(1, 81, dtype=np.float32)[:, None] * np.eye(1, WIDTH, dtype=np.float32)
    save_index(index, rows, store, "e")
    store = change(directory, Batch(delete=[f"p{i}" for i in range(60, 80)]), towers)
    found = searcher(index, store)[0].search(np.eye(1, WIDTH, dtype=np.float32), 10)
    np.testing.assert_array_equal(found.rows_bk, [np.arange(50, 60)[::-1]])


def test_each_process_searches_its_share_and_all_get_the_merged_result(corpus, monkeypatch):
    index, store = corpus
    rows_ne = embedded(store)
    shares = []
    for process in range(3):
        monkeypatch.setattr("jax.process_count", lambda: 3)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        small = ScannConfig(hash_from=20, tree_from=60, leaves_searched=1.0, rescored=500)
        shares += [searcher(index, store, small)[0], scann_in_memory(rows_ne, CONFIG)]
    assert sorted(path.suffix for path in index.glob("*.scann*")) == [
        ".scann-1-of-3", ".scann-2-of-3", ".scann-3-of-3",
    ]  # fmt: skip
    for own in (shares[::2], shares[1::2]):
        sent: list = []
        monkeypatch.setattr(
            "atlas_jax.core.multihost.of_all", lambda x, to=sent: to.append(x) or [x]
        )
        for one in own:
            one.search(queries(), K)
        assert all((rows != NO_ROW).all() for rows, _ in sent)
        monkeypatch.setattr("atlas_jax.core.multihost.of_all", lambda x, all_of=sent: all_of)
        for one in own:
            check_exact(one.search(queries(), K), rows_ne)
