"""The parts of `python -m benchmarks.search`, on a few thousand vectors."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.vectors import repeated

search_ways = pytest.importorskip("benchmarks.search_ways", reason="needs [bench] and ScaNN")
pytest.importorskip("scann")
from benchmarks import search, search_worker  # noqa: E402

ROWS, WIDTH, ASKED = 4_000, 32, 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors, queries and truth as the command writes them."""
    made = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((ROWS // 50, WIDTH))[rng.integers(0, ROWS // 50, ROWS)]
    base = (centres + 0.5 * rng.standard_normal((ROWS, WIDTH))).astype(np.float32)
    np.save(made / "mine.npy", base)
    near = base[:ASKED] + 0.3 * rng.standard_normal((ASKED, WIDTH))
    np.save(made / "asked.npy", near.astype(np.float32))
    own = [f"--embeddings={made}/mine.npy", f"--queries={made}/asked.npy", "--ways=exact"]
    assert search.main([f"--folder={made}", *own, "--build_only"]) == 0
    return made


def test_the_truth_is_the_exactly_best_rows(folder: Path) -> None:
    vectors, queries = (np.load(folder / f"{name}.npy") for name in ("vectors", "queries"))
    np.testing.assert_array_equal(vectors, np.load(folder / "mine.npy"))
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    np.testing.assert_array_equal(np.load(folder / "truth.npy"), expected)


@pytest.mark.parametrize("way", search_ways.WAYS)
def test_each_way_is_built_loaded_and_reaches_the_aims(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (search_ways.Scann, search_ways.ScannOnDisk):
        small = dataclasses.replace(kind.config, hash_from=1_000, tree_from=2_000)
        monkeypatch.setattr(kind, "config", small)
    if not (folder / way).exists():
        search_worker.build(way, folder)
    loaded = search_ways.WAYS[way].load(folder / "vectors.npy", folder / way)
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    most = loaded[1][-1]
    rows, seconds = search_worker.found(loaded, queries, most)
    assert rows.shape == (ASKED, 10) and seconds > 0
    shares = [np.isin(a, b).mean() for a, b in zip(rows, truth, strict=True)]
    assert np.mean(shares) > 0.95


def test_the_cheapest_setting_that_reaches_an_aim_is_chosen() -> None:
    truth = np.arange(640).reshape(64, 10)

    def found(queries: np.ndarray, good: int) -> np.ndarray:
        return np.where(np.arange(10) < good, truth, -1)

    chosen = search_worker.tuned((found, [2, 10]), np.zeros((64, 4), np.float32), truth)
    assert chosen == [(10,), (10,)]
    assert search_worker.tuned((found, [2]), np.zeros((64, 4)), truth) == [None, None]


def test_the_partial_reduction_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 1000)).astype(np.float32)
    got = np.asarray(search_ways.partial_reduction(jnp.asarray(scores), 5, 64))
    bins = np.full((3, 64), -1)
    for row in range(1000):  # the best row of each bin
        for b in range(3):
            at = bins[b, row % 64]
            if at < 0 or scores[b, row] > scores[b, at]:
                bins[b, row % 64] = row
    best = np.take_along_axis(bins, np.argsort(-np.take_along_axis(scores, bins, 1), 1)[:, :5], 1)
    np.testing.assert_array_equal(got, best)


def test_bins_give_the_recall_that_is_asked_for() -> None:
    rng, k, n, target = np.random.default_rng(0), 10, 4096, 0.95
    bins = search_ways.bins_for(target, k, n)
    assert (k - 1) / bins <= 1 - target
    scores = rng.standard_normal((400, n)).astype(np.float32)
    got = np.asarray(search_ways.partial_reduction(jnp.asarray(scores), k, bins))
    truth = np.argsort(-scores, axis=1)[:, :k]
    shares = [np.isin(a, b).mean() for a, b in zip(truth, got, strict=True)]
    assert target - 0.01 < np.mean(shares) < 1


def test_repeated_vectors_keep_length_and_spectrum() -> None:
    rng = np.random.default_rng(0)
    spread = np.linspace(1, 0.05, 24).astype(np.float32)
    base = rng.standard_normal((500, 24)).astype(np.float32) * spread
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    out = np.empty((5_000, 24), np.float32)
    repeated(base, out, noise=0.5)
    np.testing.assert_array_equal(out[:500], base)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, rtol=1e-5)
    near = (out[500:1000] @ base.T).max(axis=1)  # the repeated one
    assert 0.8 < near.mean() < 0.95 and near.std() > 0.01
    before, after = (np.linalg.eigvalsh(np.cov(one.T)) for one in (base, out))
    np.testing.assert_allclose(after, before, rtol=0.2, atol=2e-3)


def test_the_table_has_a_line_for_each_way_and_aim() -> None:
    built = {"build_seconds": 1.0, "disk_mib": 2.0, "memory_mib": 3.0, "queries": 64}
    aims = [{"setting": [1], "recall": 0.96}, None]
    results = {
        "exact": {**built, "aims": [aims[0]] * 2, "seconds": [[2.0, 4.0]] * 2},
        "int8": {**built, "aims": aims, "seconds": [[1.0, 1.0], []]},
    }
    table = search.table(results)
    ratios, ranges = list(table.columns[4].cells), list(table.columns[5].cells)
    assert ratios == ["1.00", "3.00", "1.00", ""] and ranges[1] == "2.00-4.00"
    assert list(table.columns[2].cells)[3] == "not reached"


def test_a_chip_reads_the_rows_once() -> None:
    # 1M x (384 + 4) bytes at 819 GB/s, and 2 x 64 x 1M x 384 operations at 197 TFLOP/s
    assert search.planned(1_000_000, 384).startswith(
        "one v5e chip, 64 queries over int8 rows: 0.47 ms to read them, 0.25 ms of products"
    )
