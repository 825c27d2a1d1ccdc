"""Packed passages: where each lies, and what is read from them, against the padded form."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.packing import (
    NO_SEGMENT,
    Packed,
    first_fit,
    pack,
    packed_or_padded_loss,
    rows_needed,
)
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.reader import fid, inputs
from atlas_jax.reader.t5 import T5
from tests.reader.small import CONFIG, PAIR, config, random_params
from tests.reader.test_soft_prompts import loud

B, K, LENGTH, ROWS = 8, 5, 8, 4
MODEL = T5(config(dropout_rate=0.0))
TARGETS = np.random.default_rng(3).integers(2, CONFIG.vocab_size, (B, 4)).astype(np.int32)
TARGETS[1:3, 2:] = 0
# Empty passages, one token, full rows, more than half a row; none of them needs a fifth row.
LENGTHS = np.array(
    [
        [3, 2, 5, 8, 1],
        [8, 8, 8, 4, 4],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [5, 5, 5, 3, 3],
        [0, 8, 0, 1, 7],
        [2, 6, 2, 6, 8],
        [7, 1, 4, 0, 5],
    ]
)
# Smaller numbers than elsewhere: the rounding of large logits alone passes 1e-6.
PARAMS = jax.tree.map(lambda x: 0.5 * x, random_params(MODEL))


def tokens_of_lengths(lengths: np.ndarray, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, CONFIG.vocab_size, (*lengths.shape, length))
    return np.where(np.arange(length) < lengths[..., None], tokens, 0).astype(np.int32)


TOKENS = tokens_of_lengths(LENGTHS)
TOKENS[0, 2, 1:3] = 0  # hidden tokens, inside a passage


def test_each_passage_lies_whole_in_the_first_row_with_room() -> None:
    """Against a loop, for lengths of every kind."""
    rng = np.random.default_rng(1)
    queries, k, length, rows = 300, 7, 9, 5
    lengths = rng.integers(0, length + 1, (queries, k))
    lengths[::3] = rng.choice([0, 1, 5, length], (queries // 3, k))
    lengths[1::3] = rng.integers(0, 4, (queries // 3, k))
    tokens = tokens_of_lengths(lengths, length)
    starts = np.asarray(jax.jit(first_fit, static_argnums=(1, 2))(lengths, rows, length))
    packed, fits = jax.jit(pack, static_argnums=1)(tokens, rows)
    assert not fits and (starts < 0).any() and packed.passages == k
    needed = np.asarray(jax.jit(rows_needed, static_argnums=1)(lengths, length))
    for query in range(queries):
        used = [0] * k
        expected = np.full(k, -1)
        for passage in sorted(range(k), key=lambda i: -lengths[query, i]):
            row = next(r for r in range(k) if used[r] + lengths[query, passage] <= length)
            expected[passage] = row * length + used[row]
            used[row] += lengths[query, passage]
        assert needed[query] == sum(n > 0 for n in used)
        expected = np.where(expected >= rows * length, -1, expected)
        np.testing.assert_array_equal(starts[query], expected)
        flat = np.zeros(rows * length, np.int32)
        segments = np.full(rows * length, NO_SEGMENT)
        for passage, start in enumerate(expected):
            if start >= 0:
                n = lengths[query, passage]
                assert start // length == (start + max(n, 1) - 1) // length  # one row
                assert (segments[start : start + n] == NO_SEGMENT).all()
                flat[start : start + n] = tokens[query, passage, :n]
                segments[start : start + n] = passage
        np.testing.assert_array_equal(packed.tokens_bgl[query].ravel(), flat)
        np.testing.assert_array_equal(packed.segments_bgl[query].ravel(), segments)


def test_passages_that_fit_say_so() -> None:
    assert bool(pack(jnp.asarray(TOKENS), ROWS)[1])
    assert not bool(pack(jnp.asarray(TOKENS), ROWS - 1)[1])


@functools.partial(jax.jit, static_argnums=(0, 3))
def signals(model: T5, params: Any, tokens: Any, rows: int) -> dict[str, jax.Array]:
    """All that is read from a batch, packed or (rows = 0) padded."""
    tokens = inputs.behind_prompt(model, params, tokens)
    given = pack(tokens, rows)[0] if rows else tokens
    enc = fid.encode(model, params, given)
    read = (model, params, enc, given, TARGETS)
    twice = jnp.stack([TARGETS, TARGETS[:, ::-1]], axis=1)
    states = enc
    if isinstance(given, Packed):  # each passage's states where the padded form has them
        starts_bk = first_fit(inputs.real_length(tokens)[..., 0], rows, tokens.shape[2])
        places = starts_bk[..., None] + jnp.arange(tokens.shape[2], dtype=jnp.int32)[None, None]
        flat = enc.reshape(B, -1, enc.shape[-1])
        states = jax.vmap(lambda x, at: x[at])(flat, jnp.minimum(places, flat.shape[1] - 1))
    return {
        "states": jnp.where((tokens > 0)[..., None], states, 0.0),
        "together": fid.fused_logprobs(*read),
        "logits": fid.fused_logits(*read),
        "variants": fid.variant_logprobs(*read[:4], twice, twice),
        "alone": fid.passage_logprobs(*read),
        "warm": fid.passage_logprobs(*read, 0.5),
        "left out": fid.leave_one_out_logprobs(*read),
        "mass": fid.cross_attention_mass(*read),
    }


def assert_equal(ours: Any, theirs: Any, tolerance: float) -> None:
    """To a tolerance that is relative for numbers above 1."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
    )


@pytest.mark.parametrize("form", ["plain", "scanned", "prefix", "prompt"])
def test_what_is_read_from_packed_passages_is_what_is_read_from_padded_ones(form: str) -> None:
    model, params = MODEL, PARAMS
    if form == "scanned":
        model = T5(config(dropout_rate=0.0, scan_layers=True, remat_policy="minimal"))
        params = random_params(model)
    elif form != "plain":
        params = loud(DeltaConfig(form, length=2))  # type: ignore[arg-type]
    packed = signals(model, params, TOKENS, ROWS + (form == "prompt"))
    padded = signals(model, params, TOKENS, 0)
    assert_equal(packed, padded, 1e-6 if form == "plain" else 5e-6)


@pytest.mark.parametrize("seed", range(6))
def test_passages_of_any_lengths_are_read_as_padded_ones(seed: int) -> None:
    """Drawn until they fit; with empty and full ones, of one token and of more than half a row."""
    rng = np.random.default_rng(seed)
    lengths = np.zeros((B, K), int)
    for query in range(B):
        while True:
            drawn = rng.choice([0, 1, LENGTH // 2, LENGTH // 2 + 1, LENGTH, *range(LENGTH)], K)
            if rows_needed(jnp.asarray(drawn[None]), LENGTH)[0] <= ROWS:
                break
        lengths[query] = drawn
    tokens = tokens_of_lengths(lengths, seed=seed)
    assert_equal(signals(MODEL, PARAMS, tokens, ROWS), signals(MODEL, PARAMS, tokens, 0), 1e-6)


@functools.partial(jax.jit, static_argnums=2)
def loss_and_grad(params: Any, tokens: Any, rows: int) -> Any:
    def loss(params: Any, given: Any) -> tuple[jax.Array, jax.Array]:
        enc = fid.encode(MODEL, params, given)
        logp_bt = fid.fused_logprobs(MODEL, params, enc, given, TARGETS)
        total, count = fid.summed_loss(logp_bt, TARGETS)
        return total / count, jnp.float32(isinstance(given, Packed))

    return jax.value_and_grad(
        lambda params: packed_or_padded_loss(loss, params, (tokens, rows)), has_aux=True
    )(params)


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_of_packed_passages_are_those_of_padded_ones(devices: int) -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    with partitioning.activate(mesh):
        (padded, was_packed), padded_grad = loss_and_grad(PARAMS, TOKENS, 0)
        assert not was_packed
        before = loss_and_grad._cache_size()  # type: ignore[attr-defined]
        # Both kinds of batches take one program.
        (packed, was_packed), packed_grad = loss_and_grad(PARAMS, TOKENS, ROWS)
        assert was_packed
        full = tokens_of_lengths(np.full((B, K), LENGTH), seed=4)
        (overfull, was_packed), overfull_grad = loss_and_grad(PARAMS, full, ROWS)
        assert not was_packed
        assert loss_and_grad._cache_size() == before + 1  # type: ignore[attr-defined]
        expected = loss_and_grad(PARAMS, full, 0)
    assert_equal(packed, padded, 1e-6)
    assert_equal(packed_grad, padded_grad, 1e-5)
    assert_equal((overfull, overfull_grad), (expected[0][0], expected[1]), 1e-6)


def test_a_pair_encoder_reads_one_passage_a_row() -> None:
    with pytest.raises(ValueError, match="one question and passage a row"):
        given = pack(jnp.asarray(TOKENS), ROWS)[0]
        jax.eval_shape(lambda params: fid.encode(T5(PAIR), params, given), random_params(T5(PAIR)))
