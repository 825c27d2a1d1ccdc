"""Switch layers against a loop in NumPy: routing, capacity, balance, one expert, refusals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec

from atlas_jax.core.errors import UserError
from atlas_jax.core.experts import (
    ExpertFields,
    Routed,
    Routing,
    SwitchMlp,
    balance,
    capacity,
    places_of,
    routed_apply,
)
from atlas_jax.core.partitioning import MeshConfig, make_mesh, param_shardings
from atlas_jax.encoders.bert import BertConfig
from atlas_jax.encoders.registry import encoder_config
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.stacks import Mlp
from atlas_jax.retriever.config import RetrieverConfig

READER = ReaderConfig(
    vocab_size=20, emb_dim=6, num_heads=1, head_dim=6, mlp_dim=10, num_encoder_layers=2,
    num_decoder_layers=2, dropout_rate=0.0,
)  # fmt: skip
FOUR = ExpertFields(num_experts=4)


def switch(config: ExpertFields, **fields: Any) -> SwitchMlp:
    activations = (jax.nn.relu,)
    init = jax.nn.initializers.normal(0.5)
    return SwitchMlp(config, 10, activations, jnp.dtype("float32"), init, **fields)


def drawn(layer: SwitchMlp, x: jax.Array, seed: int = 0) -> Any:
    params = meta.unbox(jax.jit(layer.init, static_argnums=2)(jax.random.key(seed), x, True))
    router = params["params"]["router"]["router_weights"]["w"]
    router["kernel"] = 40 * router["kernel"]  # far from even, so that places run out
    return params


def by_hand(params: Any, x: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """Token by token: what is added to each, and whether it found a place."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    router = own["router"]["router_weights"]["w"]["kernel"]
    wi, wo = own["expert"]["wi"], own["expert"]["wo"]
    added, kept = np.zeros_like(x), np.zeros(x.shape[:2], bool)
    for text in range(len(x)):
        taken = [0] * router.shape[1]
        for place in range(x.shape[1]):
            token = x[text, place].astype(np.float64)
            odds = np.exp(token @ router - (token @ router).max())
            odds /= odds.sum()
            expert = int(odds.argmax())
            if taken[expert] == places:
                continue
            taken[expert] += 1
            kept[text, place] = True
            hidden = np.maximum(token @ wi["kernel"][expert] + wi["bias"][expert], 0)
            added[text, place] = (hidden @ wo["kernel"][expert] + wo["bias"][expert]) * odds[expert]
    return added, kept


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_layer_is_the_loop_over_its_tokens(deterministic: bool) -> None:
    """With the capacity of evaluation and of training; some tokens find no place in either."""
    layer = switch(FOUR, use_bias=True)
    x = np.random.default_rng(0).normal(1.0, 1.0, (3, 24, 6)).astype(np.float32)  # alike
    params = drawn(layer, jnp.asarray(x))
    params["params"]["expert"]["wi"]["bias"] += 0.3
    params["params"]["expert"]["wo"]["bias"] += np.arange(4.0)[:, None]
    routed: Routed = []
    found = routed_apply(layer.apply, routed, np.ones((3, 24), bool), params, x, deterministic)
    places = 12 if deterministic else 8  # round(2.0 x 24 / 4) and round(1.25 x 24 / 4)
    expected, kept = by_hand(params, x, places)
    assert 0 < (~kept).sum() < kept.size / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(routed[0][0].kept_nl, kept)
    assert not np.asarray(found)[~kept].any()  # the residual alone
    np.testing.assert_allclose(balance(routed)[1], (~kept).mean(), rtol=1e-6)


def test_one_expert_is_the_plain_block() -> None:
    one = dataclasses.replace(READER, num_experts=1, expert_every=1)
    layer = SwitchMlp(
        one, 10, (jax.nn.gelu, lambda x: x), jnp.dtype("float32"), jax.nn.initializers.normal(0.5)
    )
    x = np.random.default_rng(1).normal(size=(2, 9, 6)).astype(np.float32)
    params = drawn(layer, jnp.asarray(x))
    plain = {name: {"kernel": one["kernel"][0]} for name, one in params["params"]["expert"].items()}
    expected = Mlp(READER).apply({"params": plain}, x, True)
    np.testing.assert_allclose(layer.apply(params, x, True), expected, rtol=1e-5, atol=1e-6)


def test_places_are_given_in_the_order_of_the_text() -> None:
    chosen = jax.nn.one_hot(jnp.array([[1, 1, 0, 1, 1]]), 2)
    sent = np.asarray(places_of(chosen, 2))[0]
    assert [tuple(np.argwhere(token)[0]) if token.any() else None for token in sent] == [
        (1, 0), (1, 1), (0, 0), None, None,
    ]  # fmt: skip


def test_a_text_does_not_depend_on_the_others_nor_on_padding_behind_it() -> None:
    layer = switch(FOUR)
    x = np.random.default_rng(2).normal(size=(3, 16, 6)).astype(np.float32)
    params = drawn(layer, jnp.asarray(x))
    together = np.asarray(layer.apply(params, x, True))
    np.testing.assert_allclose(layer.apply(params, x[1:2], True)[0], together[1], atol=1e-6)
    other = x.copy()
    other[:, 10:] = 7.0
    np.testing.assert_allclose(layer.apply(params, other, True)[:, :10], together[:, :10],
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("length", "experts", "factor", "places"),
    [(512, 8, 1.25, 80), (512, 8, 2.0, 128), (24, 8, 1.25, 4), (1, 8, 2.0, 1), (9, 1, 1.25, 9)],
)
def test_capacity(length: int, experts: int, factor: float, places: int) -> None:
    assert capacity(length, experts, factor) == places


def test_the_balance_loss_and_its_gradient_are_numpys() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 5, 3)).astype(np.float32)
    real = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)

    def routing(logits: jax.Array) -> Routing:
        chosen = jax.nn.one_hot(jnp.argmax(logits, -1), 3)
        return Routing(jax.nn.softmax(logits), chosen, jnp.ones((2, 5), bool))

    def loss(logits: jax.Array) -> jax.Array:
        return balance([(routing(logits), jnp.asarray(real))])[0]

    def by_hand(logits: np.ndarray, chosen: np.ndarray) -> float:
        odds = np.exp(logits.astype(np.float64))
        odds /= odds.sum(-1, keepdims=True)
        shares = [(chosen[real] == e).mean() * odds[real][:, e].mean() for e in range(3)]
        return float(3 * np.sum(shares))

    chosen = logits.argmax(-1)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    np.testing.assert_allclose(value, by_hand(logits, chosen), rtol=1e-5)
    for place in ((0, 1, 2), (1, 0, 0), (0, 4, 1)):  # the last one is padding
        moved = []
        for step in (1e-4, -1e-4):
            other = logits.astype(np.float64)
            other[place] += step
            moved.append(by_hand(other, chosen))
        slope = (moved[0] - moved[1]) / 2e-4
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-4, atol=1e-7)
    even = Routing(jnp.full((1, 3, 3), 1 / 3), jnp.eye(3)[None], jnp.ones((1, 3), bool))
    crowded = Routing(jnp.eye(3)[None, [0, 0, 0]], jnp.eye(3)[None, [0, 0, 0]], even.kept_nl)
    mask = jnp.ones((1, 3), bool)
    np.testing.assert_allclose(balance([(even, mask)])[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(balance([(crowded, mask)])[0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(balance([(even, mask), (crowded, mask)])[0], 2.0, rtol=1e-6)


def test_the_router_is_float32_in_a_bfloat16_model() -> None:
    layer = SwitchMlp(
        FOUR, 10, (jax.nn.relu,), jnp.dtype("bfloat16"), jax.nn.initializers.normal(0.5)
    )
    x = np.random.default_rng(4).normal(size=(1, 8, 6)).astype(np.float32)
    params, routed = drawn(layer, jnp.asarray(x)), Routed()
    found = routed_apply(layer.apply, routed, np.ones((1, 8), bool), params, x, True)
    assert found.dtype == jnp.bfloat16
    kernel = np.asarray(params["params"]["router"]["router_weights"]["w"]["kernel"])
    np.testing.assert_allclose(routed[0][0].probs_nle, jax.nn.softmax(x @ kernel), rtol=1e-4)


def test_experts_that_do_not_divide_over_the_mesh_are_refused() -> None:
    init = functools.partial(switch(FOUR).init, deterministic=True)
    boxed = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 4, 6)))
    with pytest.raises(UserError, match="expert/wi/kernel: axis 'expert' of size 4 is not"):
        param_shardings(boxed, make_mesh(MeshConfig(expert=8)))
    specs = param_shardings(boxed, make_mesh(MeshConfig(data=2, expert=2, model=2)))["params"]
    assert specs["expert"]["wi"]["kernel"].spec == PartitionSpec("expert", "fsdp", "model")
    assert specs["expert"]["wo"]["kernel"].spec == PartitionSpec("expert", "model", "fsdp")
    router = specs["router"]["router_weights"]["w"]["kernel"]
    assert router.spec == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": -1}, "num_experts = -1: expected a whole number, 0 or more"),
        ({"num_experts": 4, "expert_every": 3}, "expert_every = 3: no layer would have experts"),
        ({"num_experts": 4, "train_capacity_factor": 0.0}, "train_capacity_factor = 0.0: expected"),
        ({"eval_capacity_factor": 1.0}, "eval_capacity_factor = 1.0: there are no experts"),
        ({"num_experts": 4, "scan_layers": True}, "num_experts = 4: must be 0; with scan_layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"ReaderConfig.{message}"):
        dataclasses.replace(READER, **fields)
    with pytest.raises(UserError, match=f"BertConfig.{message}"):
        BertConfig(num_layers=2, **fields)


def test_models_without_experts_of_their_own_say_why() -> None:
    for name, reason in {"albert": "layers share", "xlnet": "are plain"}.items():
        with pytest.raises(UserError, match=f"Config.num_experts = 4: must be 0; .*{reason}"):
            encoder_config(name, {}, {"num_experts": 4}, "Test")
    with pytest.raises(UserError, match="RetrieverConfig.encoder_options: num_experts must be 0"):
        RetrieverConfig(encoder_options={"num_experts": 4})
    with pytest.raises(UserError, match="num_experts = 4: must be 0; a pair encoder's layers"):
        dataclasses.replace(READER, encoder="pair", encoder_mlp_dim=8, start_id=2, num_experts=4)
