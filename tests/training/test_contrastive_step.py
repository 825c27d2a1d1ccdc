"""The contrastive step: it learns, keeps its promises, and is the same on a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.contrastive import (
    ContrastiveConfig,
    crop_pair,
    empty_queue,
    moco_loss,
)
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.contrastive_step import (
    ContrastiveState,
    make_contrastive_state,
    make_contrastive_step,
)

MOCO = ContrastiveConfig(queue_size=32, momentum=0.9)
IN_BATCH = ContrastiveConfig(queue_size=0, momentum=0.0, in_batch=True)


def encoder(**changes: Any) -> DualEncoder:
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_dim": 32,
        "max_positions": 32,
        "normalize": True,
        "dropout_rate": 0.1,
    }
    return DualEncoder(RetrieverConfig(**{**fields, **changes}))


def documents() -> np.ndarray:
    """Eight documents, each over six words of its own."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((8, 26), np.int32)
    for i, row in enumerate(tokens):
        row[0], row[1:25], row[25] = 2, rng.integers(10 + 6 * i, 16 + 6 * i, 24), 3
    return tokens


def adam() -> optax.GradientTransformation:
    inner = optax.adam(1e-2)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its count
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def setup(config: ContrastiveConfig, **changes: Any) -> tuple[Any, ContrastiveState]:
    """The bare step and its first state, parameters drawn by NumPy."""
    module = encoder(**changes)
    boxed = jax.eval_shape(module.init, jax.random.key(0), documents(), documents())["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, shape: Any) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.1, shape.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, meta.unbox(boxed))
    optimizer = adam()
    state = make_contrastive_state(module, params, config, optimizer, seed=0)
    return make_contrastive_step(module, config, optimizer), state


@functools.cache
def compiled(config: ContrastiveConfig) -> tuple[Any, ContrastiveState]:
    """One compilation for all tests of a config; its states are not donated."""
    step, state = setup(config)
    return jax.jit(step), state


@functools.cache
def pairs(step: int) -> tuple[jax.Array, jax.Array]:
    return _crop_pair(jax.random.key(step), documents())


_crop_pair = jax.jit(functools.partial(crop_pair, config=IN_BATCH))


@jax.jit
def error(params: Any) -> jax.Array:
    """In-batch loss on pairs that no run trains on, without dropout."""
    query_be, key_be = encoder().apply({"params": params}, *pairs(1000))
    return moco_loss(query_be, key_be, empty_queue(0, 16), 0.05, True)[0]


def run(step: Any, state: ContrastiveState, steps: int) -> Any:
    history = []
    for i in range(steps):
        state, metrics = step(state, *pairs(i))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.mark.parametrize("config", [MOCO, IN_BATCH], ids=["moco", "in_batch"])
def test_it_learns_to_tell_documents_apart(config: ContrastiveConfig) -> None:
    step, state = compiled(config)
    before = error(state.params)
    state, history = run(step, state, 60)
    after = error(state.params)
    assert after < 0.7 * before, (before, after)
    assert history[-1]["skipped"] == 0 and int(state.step) == 60


def test_the_key_encoder_follows_and_gets_no_gradient() -> None:
    step, state = compiled(MOCO)
    new, _ = step(state, *pairs(0))
    expected = jax.tree.map(lambda k, p: 0.9 * k + 0.1 * p, state.key_params, new.params)
    for ours, theirs in zip(
        jax.tree.leaves(new.key_params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert int(new.queue.filled) == 8


def test_queue_holds_the_keys_of_the_step() -> None:
    step, state = compiled(MOCO)
    tokens_a, tokens_b = pairs(0)
    new, _ = step(state, tokens_a, tokens_b)
    embed = jax.jit(functools.partial(encoder().apply, method="embed_passage"))
    keys = embed({"params": state.params}, tokens_b)
    np.testing.assert_allclose(new.queue.keys_me[:8], keys, atol=1e-5)


def test_untied_towers_both_learn_in_batch_but_are_refused_with_momentum() -> None:
    step, state = setup(IN_BATCH, tied=False)
    new, _ = jax.jit(step)(state, *pairs(0))
    for tower in ("query_encoder", "passage_encoder"):
        table = ("embeddings", "word_embeddings", "embedding")
        before, after = state.params[tower], new.params[tower]
        for name in table:
            before, after = before[name], after[name]
        assert np.abs(before - after).max() > 1e-4
    with pytest.raises(UserError, match=r"momentum = 0.9 needs RetrieverConfig.tied = True"):
        setup(MOCO, tied=False)


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    step, state = compiled(MOCO)
    state, _ = step(state, *pairs(0))
    state = state.replace(queue=state.queue.replace(keys_me=state.queue.keys_me.at[0].set(jnp.nan)))
    bad, metrics = step(state, *pairs(1))
    assert int(metrics["skipped"]) == int(bad.skipped) == 1 and int(bad.step) == 2
    for name in ("params", "key_params", "opt_state", "queue"):
        jax.tree.map(np.testing.assert_array_equal, getattr(bad, name), getattr(state, name))


def test_randomness_depends_on_the_step_alone() -> None:
    step, state = compiled(IN_BATCH)
    whole, _ = run(step, state, 4)
    half, _ = run(step, state, 2)
    for i in (2, 3):
        half, _ = step(half, *pairs(i))
    jax.tree.map(np.testing.assert_array_equal, whole, half)
    other, _ = step(state.replace(step=jnp.int32(7)), *pairs(0))
    first, _ = step(state, *pairs(0))
    before, after = (jax.tree.leaves(s.params)[0] for s in (first, other))
    assert np.any(before != after), "another step, another dropout"


def test_sharded_equals_single_device() -> None:
    step, state = compiled(MOCO)
    expected, history = run(step, state, 2)
    mesh = partitioning.make_mesh(MeshConfig(data=4, fsdp=1, model=2))
    with partitioning.activate(mesh):
        sharded_step, fresh = setup(MOCO)
        ours, sharded_history = run(jax.jit(sharded_step), fresh, 2)
    for one, other in zip(history, sharded_history, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)
    assert len(ours.queue.keys_me.sharding.device_set) == 8
    np.testing.assert_allclose(ours.queue.keys_me, expected.queue.keys_me, atol=1e-3)
