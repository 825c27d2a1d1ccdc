"""Prompts and prefixes of encoders: P-tuning's networks, attention by hand, shared layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.deltas import DeltaConfig, folded, new_delta, trained, with_delta
from atlas_jax.core.errors import UserError
from atlas_jax.core.soft_prompts import prompt_rows
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from tests.encoders.test_deltas import KEY, TOKENS

CONFIG = EncoderModelConfig(
    vocab_size=40, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=16,
    dropout_rate=0.0,
)  # fmt: skip
ALBERT = dataclasses.replace(
    CONFIG, encoder="albert", encoder_options={"factor_dim": 8, "num_groups": 2}, num_layers=4
)


def loud(config: EncoderModelConfig, delta: DeltaConfig) -> tuple[EncoderModel, Any, Any]:
    model = EncoderModel(config)
    boxed = jax.jit(model.init)(jax.random.key(1), TOKENS)["params"]
    shapes = meta.unbox(jax.eval_shape(lambda: new_delta(boxed, delta, KEY)))
    rng = np.random.default_rng(0)
    small = jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), shapes)
    base = meta.unbox(boxed)
    return model, base, with_delta(base, small)


def states(model: EncoderModel, params: Any, tokens: Any = TOKENS) -> Any:
    return jax.jit(lambda p: model.apply({"params": p}, tokens, method="states"))(params)


@pytest.mark.parametrize("network", ["lama", "fewshot", "mlp"])
def test_p_tuning_is_pytorchs(network: str) -> None:
    torch: Any = pytest.importorskip("torch", reason="needs the extra [parity]")
    delta = DeltaConfig("prompt", length=5, network=network)
    model, _, params = loud(CONFIG, delta)
    prompt = params["encoder"]["embeddings"]["word_embeddings"]["prompt"]
    x = torch.tensor(np.asarray(prompt["table"]))[None]
    if network != "mlp":
        hidden = 8 if network == "lama" else 16
        lstm = torch.nn.LSTM(16, hidden, num_layers=2, bidirectional=True, batch_first=True)
        for layer in range(2):
            for direction, end in (("forward", ""), ("backward", "_reverse")):
                own = prompt[f"lstm_{layer}"][direction]
                for name, letters in (("input", "ih"), ("hidden", "hh")):
                    for kind, leaf in (
                        ("weight", own[name]["kernel"].T),
                        ("bias", own[name]["bias"]),
                    ):
                        into = getattr(lstm, f"{kind}_{letters}_l{layer}{end}")
                        into.data = torch.tensor(np.ascontiguousarray(leaf))
        x = lstm(x)[0]
    first, last = (
        lambda x, own=prompt[name]: x @ torch.tensor(own["kernel"]) + torch.tensor(own["bias"])
        for name in ("hidden", "out")
    )
    expected = last(torch.relu(first(x)))[0].detach().numpy()
    np.testing.assert_allclose(prompt_rows(prompt), expected, rtol=1e-4, atol=1e-5)
    plain, config = folded(params, delta)
    assert config.network == ""
    table = plain["encoder"]["embeddings"]["word_embeddings"]["prompt"]
    assert set(table) == {"table"}
    soft = jnp.array([[2, 40, 7, 44, 0]])
    np.testing.assert_allclose(states(model, plain, soft), states(model, params, soft), atol=1e-5)
    assert len(trained(plain)) == 1


def test_vectors_stand_at_their_ids() -> None:
    model, base, params = loud(CONFIG, DeltaConfig("prompt", length=3))
    np.testing.assert_array_equal(states(model, params), states(model, base))
    table = params["encoder"]["embeddings"]["word_embeddings"]
    soft = np.array([[2, 40, 7, 42, 3]])
    rows = np.concatenate([table["embedding"], table["prompt"]["table"]])[soft]
    given = model.apply(
        {"params": base}, np.where(soft >= 40, 9, soft), embedded_ble=rows, method="states"
    )
    np.testing.assert_allclose(states(model, params, soft), given, rtol=1e-5, atol=1e-5)


def test_a_prefix_of_a_bert_is_more_keys() -> None:
    """The keys and values of further tokens, given by hand, change the states alike."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    model, _, params = loud(config, DeltaConfig("prefix", length=3))
    layer = params["encoder"]["layers_0"]
    embedded = states_before(model, params)
    attention, prefix = layer["attention"], layer["attention"]["prefix"]
    b, length, d = embedded.shape

    def affine(x: Any, one: Any) -> Any:
        return x @ np.asarray(one["kernel"], np.float64) + np.asarray(one["bias"], np.float64)

    def heads(x: Any) -> Any:
        return x.reshape(b, -1, 2, d // 2)

    q = heads(affine(embedded, attention["query"])) / np.sqrt(d // 2)

    def behind(name: str) -> Any:
        own = np.broadcast_to(prefix[name], (b, 3, d))
        return heads(np.concatenate([own, affine(embedded, attention[name])], axis=1))

    k, v = behind("key"), behind("value")
    logits = np.einsum("blhc,bmhc->bhlm", q, k)
    logits[..., 3:] += np.where(np.asarray(TOKENS) > 0, 0.0, -1e9)[:, None, None]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhlm,bmhc->blhc", weights, v).reshape(b, length, d)
    expected = affine(mixed, attention["output"])
    found = model.apply(
        {"params": params}, TOKENS, method="states", capture_intermediates=True,
        mutable=["intermediates"],
    )[1]["intermediates"]["encoder"]["layers_0"]["attention"]["__call__"][0]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def states_before(model: EncoderModel, params: Any) -> np.ndarray:
    def all_states(model: EncoderModel, tokens: Any) -> Any:
        return model.encoder.all_states(tokens)

    return np.asarray(model.apply({"params": params}, TOKENS, method=all_states)[0], np.float64)


@pytest.mark.parametrize("network", ["", "mlp"])
def test_an_albert_shares_its_prefixes_as_its_layers(network: str) -> None:
    delta = DeltaConfig("prefix", length=3, network=network, width=5)
    model, base, params = loud(ALBERT, delta)
    expected = states(model, params)
    assert np.abs(expected - states(model, base)).max() > 0.1
    plain, _ = folded(params, delta)
    added = sum(x.size for x in jax.tree.leaves(plain)) - sum(x.size for x in jax.tree.leaves(base))
    assert added == 2 * 2 * 3 * 16  # groups, keys and values
    np.testing.assert_allclose(states(model, plain), expected, rtol=1e-5, atol=1e-5)
    scanned = EncoderModel(dataclasses.replace(ALBERT, scan_layers=True))
    np.testing.assert_allclose(states(scanned, params), expected, rtol=1e-4, atol=1e-4)


def test_a_tower_alone_has_its_network_at_the_top() -> None:
    """As with query-side training, where the delta stands in the query tower only."""
    delta = DeltaConfig("prefix", length=3, network="mlp", width=5)
    model, _, params = loud(CONFIG, delta)
    tower = {k: v for k, v in params["encoder"].items() if k != "prefix_mlp"}
    made = jax.eval_shape(lambda: new_delta(tower, delta, KEY))
    assert set(made) == {"prefix_mlp"}
    assert jax.tree.map(jnp.shape, made["prefix_mlp"]) == jax.tree.map(
        jnp.shape, params["encoder"]["prefix_mlp"]
    )


def test_a_prompt_begins_as_rows_of_words_and_then_common_ones() -> None:
    def encode(texts: Any, _: bool) -> Any:
        return [[len(word), 3] if word == "whole" else [len(word)] for word in texts]

    delta = DeltaConfig("prompt", length=6, words=("a", "whole"))
    ids, weights = delta.rows(encode, 40, seed=0)
    np.testing.assert_array_equal(ids[:2], [[1, 0], [5, 3]])
    np.testing.assert_array_equal(weights[:2], [[1, 0], [0.5, 0.5]])
    assert len(set(ids[2:, 0])) == 4 and ids.max() < 40
    wide, _ = dataclasses.replace(delta, length=50).rows(encode, 40, seed=0)
    assert wide.shape == (50, 2)


@pytest.mark.parametrize(("start", "low"), [("uniform", -0.5), ("uniform_released", 0.0)])
def test_a_prompt_can_begin_as_uniform_numbers(start: str, low: float) -> None:
    delta = DeltaConfig("prompt", length=50, start=start)
    table = {"word_embeddings": {"embedding": np.zeros((9, 40), np.float32)}}
    small = new_delta({"embeddings": table}, delta, jax.random.key(0))
    numbers = np.sort(np.ravel(small["embeddings"]["word_embeddings"]["prompt"]["table"]))
    assert len(numbers) == 2000 and low <= numbers[0] and numbers[-1] < 0.5
    evenly = np.linspace(low, 0.5, len(numbers))
    assert np.abs(numbers - evenly).max() < 0.04 * (0.5 - low)  # Kolmogorov-Smirnov, p < 0.004
    assert not delta.begins_as_rows
    for other in (DeltaConfig("prompt", network="mlp"), DeltaConfig("lora"),
                  DeltaConfig("prompt", words=["great"])):  # fmt: skip
        with pytest.raises(UserError, match=f"DeltaConfig.start = '{start}': only a prompt"):
            dataclasses.replace(other, start=start)
    with pytest.raises(UserError, match="DeltaConfig.start = 'rowing': use 'rows'"):
        DeltaConfig("prompt", start="rowing")
