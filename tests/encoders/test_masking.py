"""What masked language models predict: counts, shares, lengths and what is never masked."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.masking import Masked, MaskingConfig, mask_tokens

ROWS, LENGTH, VOCAB, MASK = 10_000, 48, 1000, 4
FIRST, LAST = 2, 3  # [CLS] and [SEP]


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of 20 to 48, words of 1 to 3 pieces; and where the words begin."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    starts = rng.random((ROWS, LENGTH)) < 0.7
    lengths = rng.integers(20, LENGTH + 1, ROWS)
    tokens[:, 0] = FIRST
    tokens[np.arange(ROWS), lengths - 1] = LAST
    tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
    starts[:, 1] = True
    return tokens, starts


@functools.cache
def masked(kind: str, seed: int = 0, **changes: Any) -> Masked:
    tokens, starts = texts()
    special = (tokens == FIRST) | (tokens == LAST)
    run = compiled(MaskingConfig(kind, **changes))
    return Masked(*(np.asarray(x) for x in run(tokens, starts, special, jax.random.key(seed))))


@functools.cache
def compiled(config: MaskingConfig) -> Any:
    """The rows are arguments: as constants the compiler would fold them, which takes long."""
    return jax.jit(
        lambda tokens, starts, special, key: mask_tokens(
            config, tokens, starts, special, key, MASK, VOCAB
        )
    )


def word_numbers() -> np.ndarray:
    tokens, starts = texts()
    free = (tokens != FIRST) & (tokens != LAST) & (tokens != 0)
    return np.where(free, np.cumsum(starts & free, axis=1), 0)


KINDS = ("token", "whole_word", "ngram", "span")


@pytest.mark.parametrize("kind", KINDS)
def test_shares_and_what_is_never_masked(kind: str) -> None:
    tokens, _ = texts()
    found = masked(kind)
    chosen = found.run_bl >= 0
    share = chosen.sum() / (tokens != 0).sum()
    # Rounding: a row of n tokens predicts round(0.15 n), SpanBERT's ceil(0.15 n).
    lengths = (tokens != 0).sum(1)
    budget = np.float32(0.15) * lengths.astype(np.float32)
    budget = np.ceil(budget) if kind == "span" else np.round(budget)
    assert abs(share - 0.15) < (0.002 if kind != "span" else 0.02)
    assert (chosen.sum(1) <= budget).all()
    assert chosen.sum() > 0.98 * budget.sum()
    assert not chosen[(tokens == 0) | (tokens == FIRST) | (tokens == LAST)].any()
    before, after = tokens[chosen], found.tokens_bl[chosen]
    np.testing.assert_allclose((after == MASK).mean(), 0.8, atol=0.01 if kind == "span" else 0.005)
    np.testing.assert_allclose((after == before).mean(), 0.1, atol=0.005)
    np.testing.assert_array_equal(found.tokens_bl[~chosen], tokens[~chosen])


@pytest.mark.parametrize("kind", KINDS)
def test_the_predictions_are_the_chosen_tokens(kind: str) -> None:
    tokens, _ = texts()
    found = masked(kind)
    real = found.weights_bp > 0
    assert real.sum() == (found.run_bl >= 0).sum()
    rows = np.nonzero(real)[0]
    np.testing.assert_array_equal(found.labels_bp[real], tokens[rows, found.positions_bp[real]])
    assert (found.run_bl[rows, found.positions_bp[real]] >= 0).all()
    assert (found.labels_bp[~real] == 0).all()
    ahead = np.diff(np.where(real, found.positions_bp, LENGTH + 1), axis=1)
    assert (ahead[real[:, 1:]] > 0).all()


@pytest.mark.parametrize("kind", ["whole_word", "ngram"])
def test_whole_words_are_whole(kind: str) -> None:
    words, chosen = word_numbers(), masked(kind).run_bl >= 0
    for row in range(500):
        for word in np.unique(words[row][words[row] > 0]):
            assert len(set(chosen[row][words[row] == word])) == 1


def lengths_of_runs(kind: str, longest: int) -> np.ndarray:
    """Words of each run in the rows' first run, which no budget and no neighbour has shortened."""
    words, runs = word_numbers(), masked(kind, rate=0.9, longest=longest).run_bl
    found = []
    for row, run in zip(words, runs, strict=True):
        first = row[run == 0]
        if len(first) and row.max() >= first.min() + 10:  # the row goes on behind the longest
            found.append(len(np.unique(first)))
    return np.asarray(found)


@pytest.mark.parametrize(("kind", "longest"), [("ngram", 0), ("ngram", 5), ("span", 0)])
def test_lengths_of_runs_by_a_chi_square(kind: str, longest: int) -> None:
    lengths = lengths_of_runs(kind, longest)
    sizes = np.arange(1, 1 + (longest or {"ngram": 3, "span": 10}[kind]))
    weights = 1 / sizes if kind == "ngram" else 0.8 ** (sizes - 1)
    weights = weights / weights.sum()
    if kind == "span":
        assert abs((weights * sizes).sum() - 3.80) < 0.01
    expected = weights * len(lengths)
    counts = np.array([(lengths == size).sum() for size in sizes])
    assert counts.sum() == len(lengths) > 2000
    limit = {3: 13.8, 5: 18.5, 10: 27.9}[len(sizes)]  # 0.1 % of a chi-square of 2, 4, 9 degrees
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_a_span_is_masked_or_replaced_as_one() -> None:
    found = masked("span")
    rows, columns = np.nonzero(found.run_bl >= 0)
    is_mask = found.tokens_bl[rows, columns] == MASK
    runs = rows * LENGTH + found.run_bl[rows, columns]
    for run in np.unique(runs)[:2000]:
        assert len(set(is_mask[runs == run])) == 1


def test_equal_keys_give_equal_masks_and_others_other_ones() -> None:
    first = masked("token")
    np.testing.assert_array_equal(first.tokens_bl, masked("token", max_predictions=0).tokens_bl)
    other = masked("token", 1)
    assert (first.run_bl >= 0).sum() == (other.run_bl >= 0).sum()
    assert ((first.run_bl >= 0) != (other.run_bl >= 0)).any(1).mean() > 0.99


def test_a_bound_on_predictions_and_electras_shares() -> None:
    found = masked("token", max_predictions=3, mask_rate=0.85, random_rate=0.0)
    assert found.positions_bp.shape == (ROWS, 3)
    assert ((found.run_bl >= 0).sum(1) == 3).mean() > 0.99
    tokens, chosen = texts()[0], found.run_bl >= 0
    same = (found.tokens_bl == tokens)[chosen].mean()
    np.testing.assert_allclose(same, 0.15, atol=0.006)


def test_a_row_without_free_tokens_has_no_prediction() -> None:
    tokens = jnp.array([[FIRST, LAST, 0, 0], [FIRST, 9, LAST, 0]])
    special = (tokens == FIRST) | (tokens == LAST)
    for kind in KINDS:
        config = MaskingConfig(kind)
        found = mask_tokens(config, tokens, tokens > 0, special, jax.random.key(0), MASK, VOCAB)
        assert found.weights_bp.tolist() == [[0.0], [1.0]]
        assert found.labels_bp.tolist() == [[0], [9]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "words"}, "MaskingConfig.kind = 'words': use token, whole_word, ngram, span"),
        ({"rate": 0.0}, "MaskingConfig.rate = 0.0: expected a finite number, more than 0"),
        ({"mask_rate": 0.8, "random_rate": 0.3}, "at most 1 together"),
        ({"max_predictions": -1}, "max_predictions = -1: expected a whole number, 0 or more"),
    ],
)
def test_what_nothing_can_be_drawn_by_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskingConfig(**fields)
