"""A training step that reads packed passages is the one that reads padded ones."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.training.config import StepConfig
from tests.training.models import random_batch, random_index
from tests.training.test_step import LOSSES, SINGLE, Run

EIGHT = MeshConfig(data=4, model=2)
LENGTH = 36  # of inputs of 10 to 16 tokens, so that two or three share a row


@functools.cache
def padded(loss: str) -> Any:
    return Run(SINGLE, 1, loss, reader_length=LENGTH)()


def assert_same(ours: Any, theirs: Any, packed: float = 1.0) -> None:
    """Figures and new parameters, which have moved by a tenth of the gradients."""
    (state, metrics), (expected_state, expected) = ours, theirs
    assert metrics["packed"] == packed
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        state.params,
        expected_state.params,
    )


@pytest.mark.parametrize("mesh", [SINGLE, EIGHT], ids=["one", "eight"])
@pytest.mark.parametrize("loss", LOSSES)
def test_packed_passages_take_the_step_of_padded_ones(loss: str, mesh: MeshConfig) -> None:
    assert padded(loss)[1]["retriever_grad_norm"] > 0
    run = Run(mesh, 1 if mesh is SINGLE else 8, loss, reader_length=LENGTH, packed_rows=2)
    assert_same(run(), padded(loss))


def test_passages_that_do_not_fit_are_read_padded() -> None:
    run = Run(SINGLE, 1, reader_length=LENGTH, packed_rows=1)
    assert_same(run(), padded("pdist"), packed=0.0)
    assert run.step._cache_size() == 1


def test_microbatches_with_reranked_passages_and_a_part_that_trains() -> None:
    step: dict[str, Any] = dict(
        reader_length=LENGTH, rerank=6, train=("reader/decoder/*", "retriever/*")
    )
    reader = {"scan_layers": True}
    whole = Run(SINGLE, 1, reader=reader, **step)()
    parts = Run(SINGLE, 1, reader=reader, accumulate=2, packed_rows=2, **step)()
    assert_same(parts, whole)


def test_dropout_is_drawn_from_key_and_step_alone() -> None:
    step: dict[str, Any] = dict(dropout=0.3, reader_length=LENGTH)
    run = Run(SINGLE, 1, packed_rows=2, **step)
    first, again = (run.step(jax.tree.map(np.copy, run.state), *given) for given in _given(run))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((first, again)))
    assert first[1]["packed"] == 1 and np.isfinite(first[1]["reader_loss"])


def _given(run: Run) -> Any:
    with run.active():
        yield random_index(run.mesh), random_batch()
        yield random_index(run.mesh), random_batch()


def test_rows_that_read_different_numbers_of_passages_are_not_packed() -> None:
    with pytest.raises(UserError, match=r"StepConfig.packed_rows = 2: expected 0 with StepConfig"):
        StepConfig(k=4, reads=((8, 4),), packed_rows=2)
