"""Rows of a device index that change in place: what is found is as in an index from nothing."""

import functools
import random
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.partitioning import MeshConfig, PartitionRules
from atlas_jax.index.exact import exact_search
from atlas_jax.index.hot import HotRows, moved, moves
from atlas_jax.index.int8 import stored_as
from atlas_jax.index.placement import to_device

DRAWN = np.random.default_rng(2)
EVERY = DRAWN.normal(size=(400, 8)).astype(np.float32)
QUERIES = DRAWN.normal(size=(3, 8)).astype(np.float32)


def store_of(numbers: np.ndarray) -> Any:
    """A store whose passages have tokens that tell their numbers."""
    tokens = np.repeat(numbers[:, None], 6, axis=1).astype(np.uint16)
    return SimpleNamespace(
        count=len(numbers), reader_tokens_nl=tokens, retriever_tokens_nm=tokens,
        check_tokens=lambda *given: None,
    )  # fmt: skip


def best(found: Any, index: Any, numbers: np.ndarray) -> tuple[list[set[int]], np.ndarray]:
    """The passages found for each query, and their scores."""
    rows_bk = np.asarray(found.rows_bk)
    assert (np.asarray(index.reader_tokens_nl)[rows_bk, 0] == numbers[rows_bk]).all()
    return [set(row.tolist()) for row in numbers[rows_bk]], np.asarray(found.scores_bk)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("devices", [1, 8])
def test_any_changes_and_growth_find_what_an_index_from_nothing_finds(
    devices: int, dtype: str
) -> None:
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:devices])
    drawn, hot = random.Random(devices), HotRows(mesh)
    search = jax.jit(functools.partial(exact_search, k=20, mesh=mesh))
    with partitioning.activate(mesh, tuple(PartitionRules().rules)):

        def anew(numbers: np.ndarray) -> Any:
            return to_device(stored_as(EVERY[numbers], dtype), store_of(numbers), mesh)

        living = np.arange(100)
        index, unused = anew(living), list(range(100, 400))
        for step in range(8):
            gone = np.array(drawn.sample(range(len(living)), drawn.randrange(1, 12)))
            fresh = np.array([unused.pop() for _ in range(drawn.randrange(9))], np.int64)
            if step == 3:
                rows = hot.wider(index)
                form, compile_all = hot.planned(index, rows)
                compile_all()
                index = hot.grown(index, rows)
                assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), index) == jax.tree.map(
                    lambda leaf: (leaf.shape, leaf.dtype), form
                )
            plan = moves(len(living), gone, len(fresh))
            tokens = store_of(fresh).reader_tokens_nl
            new = stored_as(EVERY[fresh], dtype), tokens, tokens, None
            index, living = hot.write(index, plan, new), moved(living, fresh, plan)
            numbers = np.sort(living)
            found, expected = (
                best(search(one, QUERIES), one, rows)
                for one, rows in ((index, living), (anew(numbers), numbers))
            )
            assert found[0] == expected[0]
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
