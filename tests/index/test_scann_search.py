"""ScaNN against exact search, one test per kind of index."""

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import NO_ROW
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.scann_segments import scann_in_memory

pytest.importorskip("scann")
KINDS = {
    "brute force": ScannConfig(),
    "hashed": ScannConfig(hash_from=1000),
    "tree, hashed": ScannConfig(hash_from=1000, tree_from=2000, leaves_searched=0.5),
}


def data(n=4000, e=24, b=16, seed=0):
    """Clustered rows, as real embeddings are."""
    rng = np.random.default_rng(seed)
    centre_ne = rng.standard_normal((n // 50, e))[rng.integers(0, n // 50, n)]
    rows_ne = (centre_ne + 0.5 * rng.standard_normal((n, e))).astype(np.float32)
    query_be = rows_ne[rng.integers(0, n, b)] + 0.3 * rng.standard_normal((b, e))
    return rows_ne, query_be.astype(np.float32)


def exact(rows_ne, query_be, k):
    scores_bn = query_be @ rows_ne.T
    rows_bk = np.argsort(-scores_bn, axis=1, kind="stable")[:, :k]
    return rows_bk, np.take_along_axis(scores_bn, rows_bk, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_against_exact(kind):
    rows_ne, query_be = data()
    searcher = scann_in_memory(rows_ne, KINDS[kind])
    assert [part.index.kind for part in searcher.parts] == [kind]
    got = searcher.search(query_be, 20)
    rows_bk, scores_bk = exact(rows_ne, query_be, 20)
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(got.rows_bk, rows_bk, strict=True)])
    assert recall >= (
        1.0 if kind == "brute force" else 0.9
    )  # trees differ a little from build to build
    real = np.einsum("be,bke->bk", query_be, rows_ne[got.rows_bk])
    np.testing.assert_allclose(got.scores_bk, real, rtol=1e-4)  # exact scores of what it found
    assert got.rows_bk.dtype == np.int32 and got.scores_bk.dtype == np.float32
    assert (np.diff(got.scores_bk, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_rows_are_replaced_by_the_next_best(kind):
    rows_ne, query_be = data()
    searcher = scann_in_memory(rows_ne, KINDS[kind])
    found_bk = searcher.search(query_be, 15).rows_bk
    excluded_bx = found_bk[:, :5].copy()
    excluded_bx[0] = NO_ROW
    got = searcher.search(query_be, 10, excluded_bx)
    # The same 15 candidates, less the excluded: a rank lower is what is seen, to the row.
    np.testing.assert_array_equal(got.rows_bk[0], found_bk[0, :10])
    np.testing.assert_array_equal(got.rows_bk[1:], found_bk[1:, 5:])


@pytest.mark.parametrize("kind", KINDS)
def test_k_rows_whenever_there_are_k(kind):
    """One leaf holds far fewer than 3,000 rows; excluded ones leave what is left."""
    rows_ne, query_be = data()
    config = KINDS[kind]
    config = ScannConfig(config.hash_from, config.tree_from, leaves_searched=0.001)
    searcher = scann_in_memory(rows_ne, config)
    got = searcher.search(query_be[:2], 3000)
    assert (got.rows_bk != NO_ROW).all()
    assert all(len(set(rows)) == 3000 for rows in got.rows_bk)
    excluded_bx = np.arange(100, dtype=np.int32)[None].repeat(2, 0)
    got = searcher.search(query_be[:2], 4000, excluded_bx)
    assert (got.rows_bk[:, :3900] >= 100).all()
    assert (got.rows_bk[:, 3900:] == NO_ROW).all() and np.isneginf(got.scores_bk[:, 3900:]).all()


def test_ties_go_to_the_lower_row():
    rows_ne = np.ones((40, 4), np.float32)
    got = scann_in_memory(rows_ne, ScannConfig()).search(np.ones((1, 4)), 40)
    np.testing.assert_array_equal(got.rows_bk[0], np.arange(40))


def test_k_above_the_corpus_and_bad_config_are_errors():
    rows_ne, query_be = data(n=100)
    with pytest.raises(UserError, match="k=101 .* index of 100"):
        scann_in_memory(rows_ne, ScannConfig()).search(query_be, 101)
    with pytest.raises(UserError, match="ScannConfig.leaves_searched"):
        ScannConfig(leaves_searched=0.0)
    with pytest.raises(UserError, match="ScannConfig.hash_from"):
        ScannConfig(hash_from=10, tree_from=5)


def test_without_scann_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scann", None)
    with pytest.raises(UserError, match="ScaNN cannot be imported.*exact search"):
        scann_in_memory(np.ones((3, 2), np.float32), ScannConfig())
