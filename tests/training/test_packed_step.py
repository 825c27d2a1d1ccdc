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
WIDTH = 16  # of the retriever's passages of 4 or 7 tokens, so that two to four share a row


def wide_index(run: Run) -> Any:
    index = random_index(run.mesh)
    tokens_nm = index.retriever_tokens_nm
    wide_nm = np.pad(np.asarray(tokens_nm), ((0, 0), (0, WIDTH - tokens_nm.shape[1])))
    return index.replace(  # type: ignore[attr-defined]
        retriever_tokens_nm=jax.device_put(wide_nm, tokens_nm.sharding)
    )


def steps(run: Run) -> Any:
    """State and figures after two steps."""
    index, state = wide_index(run), run.state
    with run.active():
        for seed in range(2):
            state, metrics = run.step(state, index, random_batch(seed))
    return jax.device_get((state, metrics))


@functools.cache
def padded(loss: str) -> Any:
    return steps(Run(SINGLE, 1, loss, reader_length=LENGTH))


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
    packs: dict[str, Any] = dict(reader_length=LENGTH, packed_rows=2, packed_passages=2)
    run = Run(mesh, 1 if mesh is SINGLE else 8, loss, **packs)
    assert_same(steps(run), padded(loss))
    assert run.step._cache_size() == 1


@pytest.mark.parametrize("training", ["query_side", "fixed"])
def test_every_mode_packs_on_eight_devices_as_it_pads_on_one(training: str) -> None:
    told: dict[str, Any] = dict(training=training, reader_length=LENGTH)
    run = Run(EIGHT, 8, packed_rows=2, **told)
    assert_same(steps(run), steps(Run(SINGLE, 1, **told)))
    assert run.step._cache_size() == 1


@pytest.mark.parametrize("rows", [(1, 2), (2, 1)], ids=["reader", "tower"])
def test_passages_that_do_not_fit_are_read_padded(rows: tuple[int, int]) -> None:
    packs = dict(zip(("packed_rows", "packed_passages"), rows, strict=True))
    run = Run(SINGLE, 1, reader_length=LENGTH, **packs)
    assert_same(steps(run), padded("pdist"), packed=0.0)
    assert run.step._cache_size() == 1


@pytest.mark.parametrize("packs", [{"packed_rows": 2}, {"packed_passages": 2}])
def test_either_model_packs_by_itself(packs: Any) -> None:
    assert_same(steps(Run(SINGLE, 1, reader_length=LENGTH, **packs)), padded("pdist"))


def test_microbatches_with_reranked_passages_and_a_part_that_trains() -> None:
    step: dict[str, Any] = dict(
        reader_length=LENGTH, rerank=6, train=("reader/decoder/*", "retriever/*")
    )
    reader, packs = {"scan_layers": True}, {"packed_rows": 2, "packed_passages": 2}
    whole = steps(Run(SINGLE, 1, reader=reader, **step))
    parts = steps(Run(SINGLE, 1, reader=reader, accumulate=2, **packs, **step))
    assert_same(parts, whole)


def test_dropout_is_drawn_from_key_and_step_alone() -> None:
    step: dict[str, Any] = dict(dropout=0.3, reader_length=LENGTH)
    run = Run(SINGLE, 1, packed_rows=2, packed_passages=3, **step)
    first, again = (run.step(jax.tree.map(np.copy, run.state), *given) for given in _given(run))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((first, again)))
    assert first[1]["packed"] == 1 and np.isfinite(first[1]["reader_loss"])


def _given(run: Run) -> Any:
    with run.active():
        yield wide_index(run), random_batch()
        yield wide_index(run), random_batch()


def test_rows_that_read_different_numbers_of_passages_are_not_packed() -> None:
    with pytest.raises(UserError, match=r"StepConfig.packed_rows = 2: expected 0 with StepConfig"):
        StepConfig(k=4, reads=((8, 4),), packed_rows=2)
    with pytest.raises(UserError, match=r"StepConfig.packed_passages = 2: expected 0 with Step"):
        StepConfig(k=4, reads=((8, 4),), packed_passages=2)
