"""Towers, pooling corner cases, untying, sharding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder, is_tied, normalized, pool, untie

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 4,
    "mlp_dim": 32,
    "max_positions": 12,
    "dropout_rate": 0.0,
}
TOKENS = np.array(
    [[2, 7, 9, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 11, 12, 13, 14, 3], [0, 0, 0, 0, 0, 0]], np.int32
)


def model(**changes: Any) -> DualEncoder:
    return DualEncoder(RetrieverConfig(**{**SMALL, **changes}))


def init(module: DualEncoder) -> Any:
    """Random parameters, biases and norms included; drawn by NumPy, which compiles nothing."""
    boxed = jax.eval_shape(module.init, jax.random.key(0), TOKENS, TOKENS)["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, shape: Any) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.2, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, meta.unbox(boxed))


@functools.cache
def _embed(module: DualEncoder, method: str) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(module.apply, method=method))


def embed(module: DualEncoder, params: Any, method: str, tokens: Any = TOKENS) -> jax.Array:
    return _embed(module, method)({"params": params}, tokens)


def test_tied_towers_embed_alike_and_untied_ones_do_not() -> None:
    tied, untied = model(), model(tied=False)
    params = init(tied)
    query_be = embed(tied, params, "embed_query")
    np.testing.assert_array_equal(query_be, embed(tied, params, "embed_passage"))
    assert query_be.shape == (4, tied.config.embedding_dim)

    two = init(untied)
    assert set(two) == {"query_encoder", "passage_encoder"}
    query_be, passage_ne = (embed(untied, two, m) for m in ("embed_query", "embed_passage"))
    assert np.abs(query_be - passage_ne).max() > 0.1


def test_untie_starts_from_copies_that_then_move_alone() -> None:
    tied, untied = model(), model(tied=False)
    params = init(tied)
    two = untie(params)
    assert is_tied(params) and not is_tied(two) and untie(two) is two
    expected = embed(tied, params, "embed_passage")
    for method in ("embed_query", "embed_passage"):
        np.testing.assert_array_equal(embed(untied, two, method), expected)

    def query_loss(two: Any) -> jax.Array:
        return jnp.sum(jnp.sin(untied.apply({"params": two}, TOKENS, method="embed_query")))

    grads = jax.jit(jax.grad(query_loss))(two)
    largest = {t: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[t])) for t in grads}
    assert largest["passage_encoder"] == 0.0 < largest["query_encoder"]


def test_untied_copies_share_no_buffer_so_a_step_may_donate_them() -> None:
    two = untie(init(model()))
    moved = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(two)
    assert set(moved) == {"query_encoder", "passage_encoder"}


def test_other_parameters_are_refused() -> None:
    with pytest.raises(UserError, match="not the parameters of a retriever.*'decoder'"):
        is_tied({"decoder": {}, "encoder": {}})


@pytest.mark.parametrize(("pooling", "normalize"), [("average", True), ("cls", False)])
def test_empty_rows_give_finite_embeddings_and_gradients(pooling: str, normalize: bool) -> None:
    module = model(pooling=pooling, normalize=normalize)
    params = init(module)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(module.apply({"params": params}, TOKENS, method="embed_passage") ** 2)

    value_and_grads = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(value_and_grads))


def test_pooling_of_known_states() -> None:
    states_bld = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    tokens_bl = np.array([[5, 6, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(pool(states_bld, tokens_bl, "average")[0], [1.5, 2.5, 3.5])
    np.testing.assert_allclose(
        pool(states_bld, tokens_bl, "sqrt")[0], np.array([3, 5, 7]) / np.sqrt(2), rtol=1e-6
    )
    np.testing.assert_array_equal(pool(states_bld, tokens_bl, "cls")[0], [0, 1, 2])
    np.testing.assert_array_equal(pool(states_bld, tokens_bl, "average")[1], [0, 0, 0])


def test_normalized_rows_have_length_one() -> None:
    x_be = np.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], np.float32)
    np.testing.assert_allclose(normalized(x_be), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert np.all(np.isfinite(jax.jacobian(normalized)(x_be)))


def test_dropout_acts_only_when_asked() -> None:
    module = model(dropout_rate=0.3)
    params = {"params": init(module)}

    @jax.jit
    def dropped(key: jax.Array) -> jax.Array:
        return module.apply(params, TOKENS, False, method="embed_query", rngs={"dropout": key})

    first, second = dropped(jax.random.key(0)), dropped(jax.random.key(1))
    np.testing.assert_array_equal(dropped(jax.random.key(0)), first)
    assert np.abs(first - second)[:3].max() > 1e-3


def test_unsigned_tokens_of_the_store_are_accepted() -> None:
    module = model()
    params = init(module)
    np.testing.assert_array_equal(
        embed(module, params, "embed_passage", TOKENS.astype(np.uint16)),
        embed(module, params, "embed_passage"),
    )


def test_sharded_equals_single_device() -> None:
    module = model(tied=False)
    params = init(module)
    tokens = np.tile(TOKENS, (2, 1))

    def value_and_grad(params: Any, tokens: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            query_be, passage_ne = module.apply({"params": params}, tokens, tokens[::-1])
            return jnp.mean(jnp.square(query_be @ passage_ne.T)), query_be

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = jax.jit(value_and_grad)(params, tokens)
    mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    boxed = jax.eval_shape(module.init, jax.random.key(0), TOKENS, TOKENS)["params"]
    shardings = partitioning.param_shardings(boxed, mesh)
    kernel = shardings["query_encoder"]["layers_0"]["intermediate"]["kernel"]
    assert "model" in kernel.spec
    rules = partitioning.STANDARD_RULES
    rows = partitioning.batch_sharding("DataConfig.batch_size", len(TOKENS), mesh, rules)
    with partitioning.activate(mesh):
        # a new function: a traced one would keep what it was traced without
        sharded = jax.jit(lambda p, t: value_and_grad(p, t))(
            jax.device_put(params, shardings),
            jax.device_put(tokens, rows),
        )
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
