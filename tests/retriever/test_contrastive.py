"""Crops as token lists would make them; the loss against NumPy; the queue."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.retriever.contrastive import (
    ContrastiveConfig,
    Queue,
    crop,
    crop_pair,
    crop_width,
    empty_queue,
    follow,
    moco_loss,
    push,
)

CLS, SEP = 2, 3


def config(**changes: Any) -> ContrastiveConfig:
    return ContrastiveConfig(**{"queue_size": 8, **changes})


def documents(lengths: list[int], width: int) -> np.ndarray:
    """Rows [CLS] 10 11 12 ... [SEP]: content token 10 + i at place i."""
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, n in zip(tokens, lengths, strict=True):
        row[: n + 2] = [CLS, *range(10, 10 + n), SEP]
    return tokens


def contents(crop_l: np.ndarray) -> np.ndarray:
    """Content places of one crop, after checking its frame."""
    real = crop_l[crop_l != 0]
    assert np.all(crop_l[len(real) :] == 0) and real[0] == CLS and real[-1] == SEP
    return real[1:-1] - 10


def test_crops_are_spans_within_the_shares() -> None:
    lengths = [40, 1, 7, 25]
    tokens = documents(lengths, 42)
    cfg = config(deletion=0.0, crop_min=0.2, crop_max=0.5)
    make = jax.jit(lambda key: crop(key, tokens, cfg))
    starts, sizes = [], []
    for seed in range(200):
        crops = np.asarray(make(jax.random.key(seed)))
        assert crops.shape == (4, crop_width(42, cfg))
        for row, n in zip(crops, lengths, strict=True):
            places = contents(row)
            np.testing.assert_array_equal(places, np.arange(places[0], places[0] + len(places)))
            assert places[-1] < n
            assert max(1, round(0.2 * n)) <= len(places) <= max(1, round(0.5 * n))
        starts.append(contents(crops[0])[0])
        sizes.append(len(contents(crops[0])))
    assert set(sizes) == set(range(8, 21)), "every length between a fifth and a half"
    assert min(starts) == 0 and max(starts) >= 30


def test_deletion_leaves_out_its_share_in_order() -> None:
    tokens = documents([100] * 50, 102)
    cfg = config(deletion=0.3, crop_min=1.0, crop_max=1.0)
    kept = [contents(row) for row in np.asarray(crop(jax.random.key(0), tokens, cfg))]
    assert all(np.all(np.diff(places) > 0) for places in kept)
    share = sum(map(len, kept)) / 5000
    assert abs(share - 0.7) < 0.03


def test_one_token_always_stays() -> None:
    cfg = config(deletion=0.99, crop_min=0.5, crop_max=0.5)
    for row in np.asarray(crop(jax.random.key(0), documents([6] * 100, 8), cfg)):
        assert len(contents(row)) >= 1


def test_padding_rows_stay_padding() -> None:
    tokens = np.zeros((2, 12), np.int32)
    assert not np.any(crop(jax.random.key(0), tokens, config()))


def test_pairs_are_two_reproducible_crops() -> None:
    tokens = documents([80] * 4, 82)
    pair = crop_pair(jax.random.key(5), tokens, config())
    again = crop_pair(jax.random.key(5), tokens, config())
    np.testing.assert_array_equal(pair[0], again[0])
    np.testing.assert_array_equal(pair[1], again[1])
    assert np.any(pair[0] != pair[1])


def reference_loss(
    query: np.ndarray, key: np.ndarray, queue: np.ndarray, temperature: float, in_batch: bool
) -> tuple[float, float]:
    """InfoNCE row by row in float64."""
    losses, hits = [], []
    for i, q in enumerate(query):
        candidates = [key[i]]
        if in_batch:
            candidates += [key[j] for j in range(len(key)) if j != i]
        candidates += list(queue)
        logits = np.array([q @ c for c in candidates]) / temperature
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0])
        hits.append(all(logits[0] > other for other in logits[1:]))
    return float(np.mean(losses)), float(np.mean(hits))


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize(("size", "filled"), [(0, 0), (12, 0), (12, 7), (12, 12)])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_loss_and_gradients(in_batch: bool, size: int, filled: int, temperature: float) -> None:
    rng = np.random.default_rng(size + filled)
    query, key = rng.normal(size=(2, 5, 6)) / 2
    rows = rng.normal(size=(size, 6)) / 2
    rows[filled:] = 1e6  # must not be seen
    keys = jnp.asarray(rows, jnp.float32)
    queue = Queue(keys, jnp.int32(0), jnp.int32(filled)) if size else None

    def loss(query: Any, key: Any) -> Any:
        return moco_loss(query, key, queue, temperature, in_batch)

    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.asarray(query), jnp.asarray(key)
    )
    expected, accuracy = reference_loss(query, key, rows[:filled], temperature, in_batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], accuracy)
    for argument, grad in enumerate(grads):
        numeric = np.zeros_like(query)
        for index in np.ndindex(query.shape):
            difference = 0.0
            for sign in (1, -1):
                args = [query.copy(), key.copy()]
                args[argument][index] += sign * 1e-5
                shifted, _ = reference_loss(*args, rows[:filled], temperature, in_batch)
                difference += sign * shifted
            numeric[index] = difference / 2e-5
        np.testing.assert_allclose(grad, numeric, rtol=1e-3, atol=1e-4)


def test_queue_is_a_ring() -> None:
    queue = empty_queue(6, 2)
    batches = [np.full((2, 2), i + 1.0) for i in range(4)]
    seen = []
    for batch in batches:
        queue = jax.jit(push)(queue, batch)
        seen.append((int(queue.pointer), int(queue.filled)))
    assert seen == [(2, 2), (4, 4), (0, 6), (2, 6)]
    np.testing.assert_array_equal(queue.keys_me[:, 0], [4, 4, 2, 2, 3, 3])


def test_a_refused_batch_leaves_the_queue_as_it_is() -> None:
    queue = push(empty_queue(4, 2), jnp.ones((2, 2)))
    same = push(queue, jnp.full((2, 2), jnp.nan), accept=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, queue, same)
    none = empty_queue(0, 2)
    assert push(none, jnp.ones((2, 2))) is none


def test_a_queue_that_the_batch_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="queue_size = 8: must be a multiple of the batch, 3"):
        push(empty_queue(8, 2), jnp.ones((3, 2)))


def test_follow() -> None:
    slow, fast = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 6.0])}
    np.testing.assert_allclose(follow(slow, fast, 0.75)["a"], [1.5, 3.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "ContrastiveConfig.temperature = 0.0"),
        ({"queue_size": -1}, "ContrastiveConfig.queue_size = -1"),
        ({"queue_size": 0}, "leave no negatives"),
        ({"momentum": 1.0}, "ContrastiveConfig.momentum = 1.0"),
        ({"deletion": -0.1}, "ContrastiveConfig.deletion = -0.1"),
        ({"crop_min": 0.6}, "crop_min = 0.6, crop_max = 0.5"),
    ],
)
def test_bad_bindings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize("in_batch", [True, False])
def test_hard_negatives_are_candidates(in_batch: bool) -> None:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 3, 4)).astype(np.float32)
    hard = rng.standard_normal((6, 4)).astype(np.float32)  # two for each query
    queue = Queue(rng.standard_normal((4, 4)).astype(np.float32), jnp.int32(0), jnp.int32(4))
    loss, metrics = moco_loss(query, key, queue, 0.5, in_batch, hard)
    losses, right = [], []
    for i in range(3):
        own = hard[2 * i : 2 * i + 2]
        others = [*hard, *np.delete(key, i, axis=0)] if in_batch else list(own)
        negatives = np.stack([*others, *np.asarray(queue.keys_me)]) @ query[i] / 0.5
        positive = key[i] @ query[i] / 0.5
        losses.append(np.logaddexp(positive, np.logaddexp.reduce(negatives)) - positive)
        right.append(positive > negatives.max())
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(right))
