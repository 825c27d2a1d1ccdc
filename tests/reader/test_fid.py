"""Fusion-in-Decoder: inputs, and the scores of single passages, against the plain way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.reader import fid, inputs
from atlas_jax.reader.t5 import T5, pick_logprobs
from tests.reader.small import config, passages, random_params

TOKENS, TARGETS = passages()
REAL = TARGETS > 0
K = TOKENS.shape[1]
MODEL = T5(config())


# Jitted: one by one, the operations of a model take far longer to compile.
encode = jax.jit(fid.encode, static_argnums=0)
fused_logits = jax.jit(fid.fused_logits, static_argnums=0)
passage_logprobs = jax.jit(fid.passage_logprobs, static_argnums=0)
leave_one_out_logprobs = jax.jit(fid.leave_one_out_logprobs, static_argnums=0)
cross_attention_mass = jax.jit(fid.cross_attention_mass, static_argnums=0)


@functools.cache
def params() -> Any:
    return random_params(MODEL)


@functools.cache
def encoded() -> jax.Array:
    return encode(MODEL, params(), TOKENS)


def fused_logprobs(encoded_bkld: Any, tokens_bkl: Any) -> np.ndarray:
    logits = fused_logits(MODEL, params(), encoded_bkld, tokens_bkl, TARGETS)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return np.take_along_axis(np.asarray(logprobs), TARGETS[..., None], axis=-1)[..., 0]


def assert_close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_join_inputs_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    query = rng.integers(2, 9, (4, 6)) * (np.arange(6) < np.array([[0], [2], [6], [5]]))
    lengths = rng.integers(0, 8, (4, 3, 1))
    passage = (rng.integers(2, 9, (4, 3, 7)) * (np.arange(7) < lengths)).astype(np.uint16)
    mask = rng.random((4, 3)) < 0.7
    for length in (4, 9, 16):
        joined = np.asarray(inputs.join_inputs(query, passage, mask, length, eos_id=1))
        assert joined.dtype == np.int32 and joined.shape == (4, 3, length)
        for b in range(4):
            for k in range(3):
                words = [*query[b][query[b] > 0], *passage[b, k][passage[b, k] > 0]]
                expected = np.zeros(length)
                if mask[b, k]:
                    words = [*words[: length - 1], 1]
                    expected[: len(words)] = words
                np.testing.assert_array_equal(joined[b, k], expected)


def test_shift_right() -> None:
    np.testing.assert_array_equal(inputs.shift_right(np.array([[5, 6, 1]])), [[0, 5, 6]])


def test_passages_are_encoded_apart() -> None:
    alone = encode(MODEL, params(), TOKENS[:, 1:2])
    assert_close(encoded()[:, 1:2], alone)


def test_passages_that_are_not_real_change_nothing() -> None:
    few, many = TOKENS[2:, :2], TOKENS[2:]
    logits = [
        fused_logits(MODEL, params(), encode(MODEL, params(), t), t, TARGETS[2:])
        for t in (few, many)
    ]
    # Rounding is in proportion to the logits; how sums are split differs between processors.
    largest = np.abs(logits[0]).max()
    assert_close(*(one / largest for one in logits))


def test_nothing_to_read_is_finite_and_reads_zeros() -> None:
    nothing = np.zeros_like(TOKENS)
    logits = fused_logits(MODEL, params(), encoded(), nothing, TARGETS)
    assert np.isfinite(logits).all()
    silent = fused_logits(MODEL, params(), 0 * encoded(), TOKENS, TARGETS)
    assert_close(logits, silent)


def test_passage_logprobs_are_those_of_each_passage_fused_alone() -> None:
    ours = passage_logprobs(MODEL, params(), encoded(), TOKENS, TARGETS)
    for k in range(K):
        plain = fused_logprobs(encoded()[:, k : k + 1], TOKENS[:, k : k + 1])
        assert_close(np.asarray(ours[:, k])[REAL], plain[REAL])


def test_passage_logprobs_divide_logits_by_the_temperature() -> None:
    ours = passage_logprobs(MODEL, params(), encoded(), TOKENS, TARGETS, temperature=0.5)
    logits = fused_logits(MODEL, params(), encoded()[:, :1], TOKENS[:, :1], TARGETS)
    plain = jax.nn.log_softmax(logits / 0.5, axis=-1)
    plain = np.take_along_axis(np.asarray(plain), TARGETS[..., None], axis=-1)[..., 0]
    assert_close(np.asarray(ours[:, 0])[REAL], plain[REAL])


def test_leave_one_out_masks_one_passage_of_the_full_pass() -> None:
    ours = leave_one_out_logprobs(MODEL, params(), encoded(), TOKENS, TARGETS)
    for k in range(K):
        without = TOKENS.copy()
        without[:, k] = 0
        plain = fused_logprobs(encoded(), without)
        assert_close(np.asarray(ours[:, k])[REAL], plain[REAL])
    everything = fused_logprobs(encoded(), TOKENS)
    assert_close(np.asarray(ours[2, 3])[REAL[2]], everything[2][REAL[2]])  # was not there


def test_scores_in_groups_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = passage_logprobs(MODEL, params(), encoded(), TOKENS, TARGETS)
    b, t = TARGETS.shape
    for passages_at_once in (2, 0):  # 0: less than one passage's worth, still one at a time
        monkeypatch.setattr(fid, "MAX_LOGITS", passages_at_once * b * t * config().vocab_size)
        anew = jax.jit(lambda *args: fid.passage_logprobs(MODEL, *args))  # reads it when traced
        assert_close(anew(params(), encoded(), TOKENS, TARGETS), whole)


def test_cross_attention_mass_counts_real_tokens_of_passages_and_targets() -> None:
    ours = cross_attention_mass(MODEL, params(), encoded(), TOKENS, TARGETS)
    assert ours.shape == TOKENS.shape[:2]
    assert (np.asarray(ours[2, 2:]) == 0).all() and (np.asarray(ours[2, :2]) > 0).all()
    # One target token more of padding or of a cut passage makes no difference.
    wider = np.pad(TARGETS, ((0, 0), (0, 1)))
    more = cross_attention_mass(MODEL, params(), encoded(), TOKENS, wider)
    assert_close(more, ours)


def test_cross_attention_mass_of_one_layer_in_plain_numpy() -> None:
    """One decoder layer and one target token, written from the formula in float64."""
    model = T5(config(num_decoder_layers=1))
    params = random_params(model, seed=3)
    tokens, targets = TOKENS[:1], np.array([[4]], np.int32)
    states = encode(model, params, tokens)
    ours = cross_attention_mass(model, params, states, tokens, targets)

    layer = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"]["layers_0"])
    x = np.asarray(params["token_embedder"]["embedding"][0], np.float64)  # the start token

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + 1e-6) * layer[name]["scale"]

    own, cross = layer["self_attention"], layer["encoder_decoder_attention"]
    y = norm(x, "pre_self_attention_layer_norm")
    x = x + y @ own["value"]["kernel"] @ own["out"]["kernel"]  # it can only attend to itself
    heads, channels = model.config.num_heads, model.config.head_dim
    query = (norm(x, "pre_cross_attention_layer_norm") @ cross["query"]["kernel"]).reshape(
        heads, -1
    )
    source = np.asarray(states, np.float64).reshape(-1, model.config.emb_dim)
    key, value = (
        (source @ cross[name]["kernel"]).reshape(-1, heads, channels) for name in ("key", "value")
    )
    logits = np.einsum("hc,shc->hs", query, key)
    logits[:, tokens.reshape(-1) == 0] = -np.inf
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    mass = (probs * np.linalg.norm(value, axis=-1).T).mean(0).reshape(tokens.shape).sum(-1)
    np.testing.assert_allclose(ours, mass, rtol=1e-4)


def test_the_summed_loss_is_the_cross_entropy_of_real_tokens() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((*TARGETS.shape, 24)))
    total, count = fid.summed_loss(pick_logprobs(logits, TARGETS), TARGETS)
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    plain = -np.take_along_axis(logprobs, TARGETS[..., None], axis=-1)[..., 0][REAL].sum()
    np.testing.assert_allclose(total, plain, rtol=1e-6)
    assert int(count) == REAL.sum()


def test_dropout_is_on_exactly_where_a_key_is_given() -> None:
    key = jax.random.key(0)
    noisy = encode(MODEL, params(), TOKENS, key)
    np.testing.assert_array_equal(noisy, encode(MODEL, params(), TOKENS, key))
    assert np.abs(noisy - encoded()).max() > 0.1
    plain = fused_logits(MODEL, params(), encoded(), TOKENS, TARGETS)
    noisy = fused_logits(MODEL, params(), encoded(), TOKENS, TARGETS, key)
    assert np.abs(noisy - plain).max() > 0.1
