"""Adapters and LoRA on encoders and on the T5: formulas, sizes, merging, what trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.core import meta

from atlas_jax.core import trees
from atlas_jax.core.deltas import (
    DeltaConfig,
    merge_lora,
    new_delta,
    split_delta,
    trained,
    unmerge_lora,
    with_delta,
)
from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import Dense
from atlas_jax.encoders.albert import AlbertConfig
from atlas_jax.encoders.bert import BertConfig, BertEncoder
from atlas_jax.encoders.registry import make_encoder
from atlas_jax.reader.scanned import stack_layers
from atlas_jax.reader.t5 import T5
from tests.reader import small as t5

KEY = jax.random.key(0)
BERT = BertConfig(
    vocab_size=40, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=16,
    dropout_rate=0.0,
)  # fmt: skip
TOKENS = jnp.array([[2, 7, 9, 11, 0], [2, 30, 0, 0, 0]])
ALL_PLACES = {
    "adapter": ("embedding", "attention", "intermediate", "output"),
    "houlsby": ("embedding", "attention", "intermediate", "output"),
    "lora": ("query", "key", "value", "attention", "intermediate", "output"),
}


def boxed_params(model: Any) -> Any:
    return model.init(jax.random.key(1), TOKENS)["params"]


def loud(delta: Any) -> Any:
    """The same leaves with numbers that matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), delta)


def size(delta: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(delta))


@pytest.mark.parametrize("kind", ["adapter", "houlsby", "lora"])
def test_the_formula_at_a_product(kind: str) -> None:
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(3, 5)), rng.normal(size=(5, 4)), rng.normal(size=4)
    down, up = rng.normal(size=(4, 2)), rng.normal(size=(2, 4))
    y = x @ w + b
    name = {"adapter": "adapter_relu", "houlsby": "adapter_gelu_tanh", "lora": "lora"}[kind]
    tree: dict[str, Any] = {"down": {"kernel": down}, "up": {"kernel": up}}
    if kind == "adapter":
        expected = y + np.maximum(y @ down, 0) @ up
    elif kind == "houlsby":
        a, c = rng.normal(size=2), rng.normal(size=4)
        tree["down"]["bias"], tree["up"]["bias"] = a, c
        h = y @ down + a
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        expected = y + h @ up + c
    else:
        tree["down"]["kernel"] = down = rng.normal(size=(5, 2))
        tree["scale"] = np.float32(2.0)
        expected = y + 2.0 * (x @ down) @ up
    params = {"kernel": w, "bias": b, name: tree}
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    found = Dense(4, ("embed", "mlp"), use_bias=True).apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sizes_of_the_papers() -> None:
    large = dataclasses.replace(
        BERT, vocab_size=9, hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096
    )
    boxed = jax.eval_shape(lambda: boxed_params(BertEncoder(large)))

    def count(config: DeltaConfig) -> int:
        return size(jax.eval_shape(lambda: new_delta(boxed, config, KEY)))

    assert count(DeltaConfig("adapter", 128)) == 12_582_912  # LiST's on RoBERTa-large
    assert count(DeltaConfig("houlsby", 64)) == 48 * (2 * 64 * 1024 + 64 + 1024)
    assert count(DeltaConfig("lora", 8)) == 48 * (2 * 8 * 1024 + 1)  # and its scale


@pytest.mark.parametrize("kind", ["adapter", "houlsby", "lora"])
def test_a_fresh_delta_leaves_the_model_as_it_was(kind: str) -> None:
    model = BertEncoder(BERT)
    boxed = boxed_params(model)
    base = meta.unbox(boxed)
    places = ALL_PLACES[kind]
    delta = meta.unbox(new_delta(boxed, DeltaConfig(kind, 4, places=places), KEY))
    plain = model.apply({"params": base}, TOKENS)
    quiet = model.apply({"params": with_delta(base, delta)}, TOKENS)
    np.testing.assert_allclose(quiet, plain, atol=1e-4)  # LiST's and Houlsby's are nearly 0
    zeros = jax.tree.map(jnp.zeros_like, delta)
    silent = model.apply({"params": with_delta(base, zeros)}, TOKENS)
    np.testing.assert_array_equal(silent, plain)
    for path, leaf in traverse_util.flatten_dict(loud(delta), sep="/").items():
        if path.endswith("up/kernel") and kind == "houlsby":  # each single place is read
            one = traverse_util.flatten_dict(zeros, sep="/")
            one[path.replace("up/kernel", "up/bias")] = jnp.linspace(-1, 1, leaf.shape[-1])
            tree = with_delta(base, traverse_util.unflatten_dict(one, sep="/"))
            assert np.abs(model.apply({"params": tree}, TOKENS) - plain).max() > 1e-3, path
    back, small = split_delta(with_delta(base, delta))
    jax.tree.map(np.testing.assert_array_equal, (back, small), (base, delta))


def test_merged_lora_is_unmerged_lora_and_comes_out_again() -> None:
    model = BertEncoder(BERT)
    boxed = boxed_params(model)
    base, config = meta.unbox(boxed), DeltaConfig("lora", 4, places=ALL_PLACES["lora"])
    delta = loud(meta.unbox(new_delta(boxed, config, KEY)))
    both = with_delta(base, delta)
    merged = merge_lora(both)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    expected = model.apply({"params": both}, TOKENS)
    np.testing.assert_allclose(model.apply({"params": merged}, TOKENS), expected, atol=1e-4)
    assert np.abs(expected - model.apply({"params": base}, TOKENS)).max() > 0.1
    again = unmerge_lora(merged, delta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, both)
    adapter = meta.unbox(new_delta(boxed, DeltaConfig("adapter", 4), KEY))
    with pytest.raises(UserError, match="only LoRA can be merged"):
        merge_lora(with_delta(base, adapter))


def test_only_the_delta_trains_and_the_optimiser_holds_nothing_else() -> None:
    model = BertEncoder(BERT)
    boxed = boxed_params(model)
    config = DeltaConfig("adapter", 4)
    params = with_delta(meta.unbox(boxed), meta.unbox(new_delta(boxed, config, KEY)))
    patterns = (*trained(params), "*/attention_layer_norm/*")
    trainable, frozen = trees.split(params, patterns, "DeltaConfig.train")
    assert size(trainable) == 2 * 2 * 2 * 4 * 16 + 2 * 2 * 16
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    state = optimizer.init(trainable)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trainable))

    @jax.jit
    def step(trainable: Any, state: Any) -> tuple[Any, Any]:
        def loss(trainable: Any) -> jax.Array:
            whole = trees.joined(trainable, frozen)
            return jnp.mean(jnp.sin(model.apply({"params": whole}, TOKENS)))

        grads = jax.grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its count
            changes, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state

    after = trainable
    for _ in range(20):
        after, state = step(after, state)
    jax.tree.map(lambda a, b: np.testing.assert_raises(
        AssertionError, np.testing.assert_array_equal, a, b), after, trainable)  # fmt: skip
    whole = trees.joined(after, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    untouched, _ = trees.split(whole, patterns)[::-1]
    jax.tree.map(np.testing.assert_array_equal, untouched, frozen)


@pytest.mark.parametrize("kind", ["adapter", "houlsby", "lora"])
def test_a_t5_takes_them_scanned_or_not(kind: str) -> None:
    plain, scanned = (T5(t5.config(dropout_rate=0.0, scan_layers=s)) for s in (False, True))
    tokens, targets = jnp.array([[3, 4, 5, 1]]), jnp.array([[0, 6, 7]])
    places = tuple(p for p in ALL_PLACES[kind] if p != "embedding")
    config = DeltaConfig(kind, 2, places=places)

    def boxed(model: T5) -> Any:
        return jax.eval_shape(model.init, KEY, tokens, targets)["params"]

    base = t5.random_params(plain)
    delta = loud(meta.unbox(jax.eval_shape(lambda: new_delta(boxed(plain), config, KEY))))
    both = with_delta(base, delta)
    expected = plain.apply({"params": both}, tokens, targets)
    assert np.abs(expected - plain.apply({"params": base}, tokens, targets)).max() > 0.1
    found = scanned.apply({"params": stack_layers(both)}, tokens, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    shapes = jax.eval_shape(lambda: new_delta(boxed(scanned), config, KEY))
    assert jax.tree.map(jnp.shape, meta.unbox(shapes)) == jax.tree.map(
        jnp.shape, split_delta(stack_layers(both))[1]
    )
    axes = {len(box.names) == box.value.ndim for box in jax.tree.leaves(
        shapes, is_leaf=lambda x: isinstance(x, meta.Partitioned))}  # fmt: skip
    assert axes == {True}


@pytest.mark.parametrize("sharing", ["all", "attention"])
def test_an_albert_shares_its_adapters_as_its_layers(sharing: str) -> None:
    fields = {f.name: getattr(BERT, f.name) for f in dataclasses.fields(BERT)}
    config = AlbertConfig(**{**fields, "initializer": "normal"}, factor_dim=8, sharing=sharing)
    model = make_encoder(config)
    boxed = boxed_params(model)
    delta = loud(meta.unbox(new_delta(boxed, DeltaConfig("adapter", 4), KEY)))
    assert size(delta) == (2 if sharing == "all" else 3) * 2 * 4 * 16
    params = {"params": with_delta(meta.unbox(boxed), delta)}
    scanned = make_encoder(dataclasses.replace(config, scan_layers=True))
    np.testing.assert_allclose(
        scanned.apply(params, TOKENS), model.apply(params, TOKENS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "soft"}, "DeltaConfig.kind = 'soft': use none, adapter, houlsby, lora, prompt,"),
        ({"kind": "prompt", "places": ("query",)}, "'query' is no place of 'prompt'; it has none"),
        ({"kind": "prefix", "network": "lama"}, "network = 'lama': 'prefix' has '', 'mlp'"),
        ({"kind": "lora", "network": "mlp"}, "network = 'mlp': 'lora' has ''"),
        ({"kind": "prefix", "length": 0}, "DeltaConfig.length = 0: expected a whole number from 1"),
        ({"kind": "adapter", "places": ("query",)}, "'query' is no place of 'adapter'; it has"),
        ({"kind": "lora", "rank": 0}, "DeltaConfig.rank = 0: expected a whole number from 1"),
        ({"kind": "adapter", "activation": "elu"}, "activation = 'elu': use '' or 'relu'"),
    ],
)
def test_what_no_method_has_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeltaConfig(**fields)


def test_a_place_or_a_pattern_that_the_model_lacks_is_named() -> None:
    model = T5(t5.config())
    boxed = jax.eval_shape(model.init, KEY, TOKENS, TOKENS)["params"]
    with pytest.raises(UserError, match="this model has no place 'embedding'"):
        new_delta(boxed, DeltaConfig("adapter", places=("embedding",)), KEY)
    with pytest.raises(UserError, match=r"StepConfig.train: 'encoder/lora\*' is the path of no"):
        trees.split(boxed_params(BertEncoder(BERT)), ("encoder/lora*",), "StepConfig.train")
