"""Prompts and prefixes of a reader: attention by hand, decoding, networks and their folding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.deltas import DeltaConfig, folded, new_delta, with_delta
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.attention import Attention, KeyValue, mask_bias
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.scanned import stack_layers
from atlas_jax.reader.t5 import T5
from tests.reader.small import CONFIG, config, passages, random_params

KEY = jax.random.key(0)
MODEL = T5(config(dropout_rate=0.0))
SCANNED = T5(config(dropout_rate=0.0, scan_layers=True))
PREFIX = DeltaConfig("prefix", length=3, network="mlp", width=7)
PROMPT = DeltaConfig("prompt", length=3)
TOKENS, TARGETS = passages()


def boxed(model: T5) -> Any:
    tokens = jnp.ones((1, 2), jnp.int32)
    return jax.eval_shape(model.init, KEY, tokens, tokens)["params"]


def loud(delta: DeltaConfig, model: T5 = MODEL) -> Any:
    """Parameters of the reader with a delta whose numbers matter."""
    shapes = meta.unbox(jax.eval_shape(lambda: new_delta(boxed(model), delta, KEY)))
    rng = np.random.default_rng(3)
    small = jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), shapes)
    return with_delta(random_params(model), small)


def read(model: T5, params: Any) -> Any:
    return jax.jit(lambda params: model.apply({"params": params}, TOKENS[0], TARGETS[[0] * 4]))(
        params
    )


def test_a_prefix_is_keys_and_values_in_front() -> None:
    rng = np.random.default_rng(0)
    h, c, p, q, s = CONFIG.num_heads, CONFIG.head_dim, 3, 4, 5
    module = Attention(config(dropout_rate=0.0))
    x, source = rng.normal(size=(2, q, 12)), rng.normal(size=(2, s, 12))
    kernels = {name: {"kernel": rng.normal(size=(12, h * c))} for name in ("query", "key", "value")}
    kernels["out"] = {"kernel": rng.normal(size=(h * c, 12))}
    own = {half: rng.normal(size=(p, h * c)) for half in ("key", "value")}
    position, seen = rng.normal(size=(1, h, q, s)), rng.random((2, 1, 1, s)) > 0.4
    seen[1] = False  # a row that may read its prefix alone

    def heads(y: Any) -> Any:
        return y.reshape(*y.shape[:-1], h, c)

    def behind(name: str) -> Any:
        below = np.broadcast_to(own[name], (2, p, h * c))
        return heads(np.concatenate([below, source @ kernels[name]["kernel"]], axis=1))

    logits = np.einsum("nqhc,nshc->nhqs", heads(x @ kernels["query"]["kernel"]), behind("key"))
    logits[..., p:] += position + np.where(seen, 0.0, -1e10)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("nhqs,nshc->nqhc", weights, behind("value")).reshape(2, q, h * c)

    def run(module: Attention, x: Any, source: Any) -> Any:
        biases = (jnp.asarray(position, jnp.float32), mask_bias(jnp.asarray(seen)))
        return module(x, module.keys_values(source), biases, True)

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**kernels, "prefix": own})
    run_on = (jnp.asarray(x, jnp.float32), jnp.asarray(source, jnp.float32))
    found, probs = module.apply({"params": params}, *run_on, method=run)
    np.testing.assert_allclose(found, mixed @ kernels["out"]["kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probs, weights[..., p:], rtol=1e-4, atol=1e-5)
    assert isinstance(module.apply({"params": params}, run_on[1], method="keys_values"), KeyValue)


@pytest.mark.parametrize("delta", [PREFIX, DeltaConfig("prefix", length=3)], ids=["mlp", "bare"])
def test_a_prefix_network_folds_and_its_layers_may_be_scanned(delta: DeltaConfig) -> None:
    params = loud(delta)
    expected = read(MODEL, params)
    assert np.abs(expected - read(MODEL, random_params(MODEL))).max() > 0.1
    plain, config = folded(params, delta)
    assert config.network == "" and config.length == 3
    np.testing.assert_allclose(read(MODEL, plain), expected, rtol=1e-5, atol=1e-5)
    stacked = stack_layers(params)
    np.testing.assert_allclose(read(SCANNED, stacked), expected, rtol=1e-3, atol=1e-3)
    refolded, _ = folded(stacked, delta)
    jax.tree.map(np.testing.assert_array_equal, refolded, stack_layers(plain))
    shapes = meta.unbox(jax.eval_shape(lambda: new_delta(boxed(SCANNED), delta, KEY)))
    small = jax.tree.map(jnp.shape, with_delta(random_params(SCANNED), shapes))
    assert small == jax.tree.map(jnp.shape, stacked)


def test_the_columns_of_the_network_are_layers_and_then_keys_and_values() -> None:
    params = loud(PREFIX)
    network = params["decoder"]["prefix_mlp"]["encoder_decoder_attention"]
    hidden = np.tanh(network["table"] @ network["down"]["kernel"] + network["down"]["bias"])
    both = (hidden @ network["up"]["kernel"] + network["up"]["bias"]).reshape(3, 4, 8)  # p, 2 L
    plain, _ = folded(params, PREFIX)
    for layer in range(2):
        own = plain["decoder"][f"layers_{layer}"]["encoder_decoder_attention"]["prefix"]
        np.testing.assert_allclose(own["key"], both[:, 2 * layer], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(own["value"], both[:, 2 * layer + 1], rtol=1e-5, atol=1e-5)


def test_a_prefix_of_zeros_is_not_the_identity() -> None:
    params = loud(DeltaConfig("prefix", length=3))
    base = random_params(MODEL)
    zeros = jax.tree.map(np.zeros_like, params)
    for stack in ("encoder", "decoder"):
        for layer in ("layers_0", "layers_1"):
            for name in params[stack][layer]:
                if "prefix" in params[stack][layer][name]:
                    base[stack][layer][name]["prefix"] = zeros[stack][layer][name]["prefix"]
    assert np.abs(read(MODEL, base) - read(MODEL, random_params(MODEL))).max() > 0.1


def test_sizes() -> None:
    def count(**fields: Any) -> int:
        delta = DeltaConfig(**fields)
        shapes = jax.eval_shape(lambda: new_delta(boxed(MODEL), delta, KEY))
        return sum(x.size for x in jax.tree.leaves(shapes))

    d, p, h_c, layers, mid = 12, 5, 8, 2, 7
    network = p * d + d * mid + mid + (mid + 1) * layers * 2 * h_c
    assert count(kind="prefix", length=p) == 3 * p * 2 * layers * h_c
    assert count(kind="prefix", length=p, places=("cross",)) == p * 2 * layers * h_c
    assert count(kind="prefix", length=p, network="mlp", width=mid) == 3 * network
    assert count(kind="prompt", length=p) == p * d
    lstm = {"lama": d // 2, "fewshot": d}
    for name, h in lstm.items():
        gates = 2 * (4 * h * (d + h) + 8 * h) + 2 * (4 * h * (2 * h + h) + 8 * h)
        mlp = 2 * h * d + d + d * d + d
        assert count(kind="prompt", length=p, network=name) == p * d + gates + mlp
    assert count(kind="prompt", length=p, network="mlp") == p * d + 2 * (d * d + d)


@pytest.mark.parametrize("method", ["greedy", "beam"])
@pytest.mark.parametrize("delta", [PREFIX, PROMPT], ids=["prefix", "prompt"])
@pytest.mark.parametrize("model", [MODEL, SCANNED], ids=["unrolled", "scanned"])
def test_decoding_is_what_teacher_forcing_says(method: str, delta: DeltaConfig, model: T5) -> None:
    params = loud(delta)
    params = stack_layers(params) if model is SCANNED else params
    settings = GenerationConfig(method=method, max_length=6, num_beams=3, eos_id=999)  # type: ignore[arg-type]

    @jax.jit
    def decoded(params: Any) -> Any:
        tokens = inputs.behind_prompt(model, params, jnp.asarray(TOKENS))
        enc = fid.encode(model, params, tokens)
        b, k, length, d = enc.shape
        source, mask = enc.reshape(b, k * length, d), (tokens != 0).reshape(b, -1)
        found, scores, _ = generate(model, params, source, mask, settings)
        return found, scores, fid.fused_logits(model, params, enc, tokens, found)

    tokens, scores, logits = decoded(params)
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    if method == "greedy":
        np.testing.assert_array_equal(logprobs.argmax(-1), tokens)
    picked = np.take_along_axis(logprobs, np.asarray(tokens)[..., None], axis=-1)[..., 0].sum(-1)
    length = 6 if method == "beam" else 1
    np.testing.assert_allclose(picked / length, scores, rtol=1e-4, atol=1e-4)


def test_a_prompt_stands_in_front_of_every_real_passage() -> None:
    params = loud(PROMPT)
    tokens = np.asarray(inputs.behind_prompt(MODEL, params, jnp.asarray(TOKENS)))
    assert tokens.shape == (3, 4, 8)
    v = CONFIG.vocab_size
    np.testing.assert_array_equal(tokens[0, 0, :3], [v, v + 1, v + 2])
    assert not tokens[2, 2:].any()  # passages that are none
    np.testing.assert_array_equal(tokens[..., 3:], TOKENS)
    states = np.asarray(MODEL.apply({"params": params}, tokens[0], method="encode"))
    # the vectors are read as tokens with these rows of the table would be
    table = params["token_embedder"]
    whole = np.concatenate([table["embedding"], table["prompt"]["table"]])
    wide = T5(config(dropout_rate=0.0, vocab_size=v + 3))
    alike = {**params, "token_embedder": {"embedding": whole}}
    expected = wide.apply({"params": alike}, tokens[0], method="encode")
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-5)
