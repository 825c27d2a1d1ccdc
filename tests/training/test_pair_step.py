"""The step of a reader with a pair encoder: kept states, meshes, rows that read different k."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig
from atlas_jax.corpus.retrieval import make_device_retrieve
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.placement import rows_sharding
from atlas_jax.models.parameters import init_params
from atlas_jax.models.towers import embed_query
from atlas_jax.reader import fid
from atlas_jax.training.config import StepConfig
from atlas_jax.training.loss import make_loss_sums
from atlas_jax.training.state import split_trainable, what_trains
from tests.training.models import random_batch, random_index, tiny_models

PAIR: dict[str, Any] = {
    "encoder": "pair",
    "num_encoder_layers": 2,
    "apart_layers": 1,
    "encoder_mlp_dim": 32,
    "start_id": 2,
    "pointer": True,
}
LENGTH = 6 + 2 + 9 + 2  # a question's block and a passage's
ONE = MeshConfig(1, 1, 1)


def losses(
    mesh_config: MeshConfig = ONE,
    reader: dict[str, Any] | None = None,
    kept: bool = False,
    loss: str = "pdist",
    hidden: Any = None,
    **step: Any,
) -> Any:
    """Loss sums and gradients of one batch."""
    devices = 1 if mesh_config is ONE else 8
    mesh = partitioning.make_mesh(mesh_config, jax.devices()[:devices])
    models = tiny_models(**(PAIR if reader is None else reader))
    config = StepConfig(k=4, reader_length=LENGTH, retriever_training="query_side", **step)
    distillation = DistillationConfig(loss, 0.5, 0.5)
    retrieve = make_device_retrieve(config.searched, mesh)
    with partitioning.activate(mesh, STANDARD_RULES):
        params = init_params(models, 0, mesh, STANDARD_RULES)
        index = random_index(mesh)
        if kept:
            tokens = np.asarray(index.reader_tokens_nl)
            states = fid.encode_apart(models.reader, params["reader"], tokens, 9 + 2)
            flat = np.asarray(states).reshape(len(tokens), -1)
            index = index.replace(apart_nf=jax.device_put(flat, rows_sharding(mesh)))
        sums = make_loss_sums(models, config, distillation, retrieve)
        trainable, frozen = split_trainable(params, what_trains(config, models))
        batch = random_batch().replace(hidden_b3=hidden)
        grad = jax.jit(jax.grad(sums, has_aux=True))
        return jax.device_get(grad(trainable, frozen, index, batch, jax.random.key(0)))


def assert_close(ours: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5), ours, expected
    )


@pytest.mark.slow
def test_kept_states_give_the_losses_and_gradients_of_running_the_lower_layers() -> None:
    assert_close(losses(kept=True), losses())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pdist", "adist", "emdr2", "loop"])
def test_every_loss_teaches_the_retriever(loss: str) -> None:
    grads, sums = losses(loss=loss, kept=True)
    assert sums["retriever"]["loss"] > 0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads["retriever"])) > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pdist", "emdr2"])
def test_a_4x2_mesh_gives_the_losses_and_gradients_of_a_single_device(loss: str) -> None:
    found = losses(MeshConfig(data=4, model=2), loss=loss, kept=True)
    assert_close(found, losses(loss=loss, kept=True))


def test_what_is_hidden_of_a_passage_is_not_read() -> None:
    _, plain = losses(kept=True)
    nothing = np.full((8, 3), -1, np.int32)
    assert_close(losses(kept=True, hidden=nothing)[1], plain)
    # Of every row the passage it finds first: its tokens matter, so the loss changes.
    models = tiny_models(**PAIR)
    mesh = partitioning.make_mesh(ONE, jax.devices()[:1])
    with partitioning.activate(mesh, STANDARD_RULES):
        params, batch = init_params(models, 0, mesh, STANDARD_RULES), random_batch()
        query_be = embed_query(models.retriever, params, batch)
        found = make_device_retrieve(4, mesh)(random_index(mesh), query_be, batch)
    hidden = np.zeros((8, 3), np.int32)
    hidden[:, 0], hidden[:, 2] = np.asarray(found.rows_bk)[:, 0], 9
    _, less = losses(kept=True, hidden=hidden)
    assert less["reader"]["count"] == plain["reader"]["count"]
    assert abs(less["reader"]["loss"] - plain["reader"]["loss"]) > 1e-3


@pytest.mark.parametrize("reader", [{}, PAIR], ids=["t5", "pair"])
def test_rows_that_read_different_k_add_up(reader: dict[str, Any]) -> None:
    _, mixed = losses(reader=reader, reads=((5, 1), (3, 4)))
    few, many = (rows_of(reader, rows, k) for rows, k in ((slice(5), 1), (slice(5, 8), 4)))
    for part in ("reader", "retriever"):
        total = float(few[part]["loss"]) + float(many[part]["loss"])
        np.testing.assert_allclose(mixed[part]["loss"], total, rtol=1e-4, atol=1e-6)


def rows_of(reader: dict[str, Any], rows: slice, k: int) -> Any:
    """The sums of some rows of the batch alone."""
    mesh = partitioning.make_mesh(ONE, jax.devices()[:1])
    models = tiny_models(**reader)
    config = StepConfig(k=k, reader_length=LENGTH, retriever_training="query_side")
    with partitioning.activate(mesh, STANDARD_RULES):
        params = init_params(models, 0, mesh, STANDARD_RULES)
        sums = make_loss_sums(
            models, config, DistillationConfig("pdist", 0.5, 0.5), make_device_retrieve(k, mesh)
        )
        batch = jax.tree.map(lambda leaf: leaf[rows], random_batch())
        args = (*split_trainable(params, what_trains(config, models)), random_index(mesh), batch)
        return jax.device_get(sums(*args, jax.random.key(0))[1])


def test_reads_have_to_cover_the_batch() -> None:
    with pytest.raises(UserError, match=r"StepConfig.reads .* 6 rows .* the batch has 8"):
        losses(reads=((6, 2),))
    with pytest.raises(UserError, match="StepConfig.reads"):
        StepConfig(k=2, reads=((8, 3),))
    with pytest.raises(UserError, match="StepConfig.accumulate"):
        StepConfig(k=4, accumulate=2, reads=((8, 3),))
