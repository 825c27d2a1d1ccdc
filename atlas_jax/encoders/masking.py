"""Which tokens a masked language model has to predict, and what it reads in their place.

Arrays in, arrays out, inside of a compiled step: a mask is drawn anew each time that a text is
read, from the key of the step (RoBERTa's dynamic masking). Sources: google-research/bert and
albert (create_pretraining_data.py), SpanBERT (masking.py), electra (pretrain_helpers.py).
"""

import dataclasses
import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Array

KINDS = ("token", "whole_word", "ngram", "span")
# Words in the longest run. ALBERT's n-grams have a probability in proportion to 1 / n; SpanBERT's
# spans are geometric, cut at 10 words and renormalised.
_LONGEST = {"whole_word": 1, "ngram": 3, "span": 10}
_SPAN_P = 0.2
_SPARE = 8  # tries beyond two for each prediction


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How tokens are chosen and what is put in their place.

    Attributes:
      kind: 'token' (uniform), 'whole_word' (all pieces of a word or none), 'ngram' (ALBERT: runs of
        1 to 3 words that never overlap) or 'span' (SpanBERT: runs of 3.8 words on average).
      rate: share of the real tokens, special ones included, that is predicted.
      max_predictions: at most so many in a row; 0 = no bound. BERT and ALBERT say 20, which at 512
        tokens is 4 %.
      longest: words of the longest run, of 'ngram' or 'span'; 0 = as released, 3 and 10. XLNet's
        targets are n-grams of at most 5.
      mask_rate: share of the chosen that becomes the mask token; ELECTRA's generator has 0.85.
      random_rate: share that becomes a random token; the rest stays.
    """

    kind: str = "token"
    rate: Annotated[float, Meta(gt=0, lt=1)] = 0.15
    max_predictions: bounds.AtLeast0 = 0
    longest: bounds.AtLeast0 = 0
    mask_rate: bounds.Share = 0.8
    random_rate: bounds.Share = 0.1

    def __post_init__(self) -> None:
        """Refuse what nothing could be drawn by.

        Raises:
          UserError: names the binding and what it may be.
        """
        bounds.check(self)
        if self.kind not in KINDS:
            raise UserError(f"MaskingConfig.kind = {self.kind!r}: use {', '.join(KINDS)}")
        if self.longest and self.kind not in ("ngram", "span"):
            raise UserError(
                f"MaskingConfig.longest = {self.longest}: expected 0 with kind = {self.kind!r}; "
                "'ngram' and 'span' have runs of several words"
            )
        if self.mask_rate + self.random_rate > 1:
            raise UserError(
                f"MaskingConfig.mask_rate = {self.mask_rate} and random_rate = "
                f"{self.random_rate}: shares of the whole, at most 1 together"
            )

    @property
    def words(self) -> int:
        """Words in the longest run; 1 where tokens are chosen one by one."""
        return self.longest or _LONGEST.get(self.kind, 1)

    def width(self, length: int) -> int:
        """How many predictions a row of so many tokens has room for."""
        most = max(1, math.ceil(self.rate * length))
        return min(most, self.max_predictions) if self.max_predictions else most


class Masked(NamedTuple):
    """Rows as the model reads them, and what it has to say.

    Attributes:
      tokens_bl: with masks and random tokens.
      positions_bp: of the predictions, ascending; unused ones are 0.
      labels_bp: the tokens that were there.
      weights_bp: 1 for a prediction, 0 for what only fills the row.
      run_bl: number of the run of words that each chosen token belongs to, from 0; -1 elsewhere.
    """

    tokens_bl: Integer[Array, "b l"]
    positions_bp: Int[Array, "b p"]
    labels_bp: Integer[Array, "b p"]
    weights_bp: Float[Array, "b p"]
    run_bl: Int[Array, "b l"]


def mask_tokens(
    config: MaskingConfig,
    tokens_bl: Integer[Array, "b l"],
    starts_bl: Bool[Array, "b l"],
    special_bl: Bool[Array, "b l"],
    key: jax.Array,
    mask_id: int,
    vocab_size: int,
) -> Masked:
    """Draw what is predicted, and put masks there.

    Args:
      config: how.
      tokens_bl: int tokens, pad 0.
      starts_bl: True where a word begins; the pieces after it belong to it.
      special_bl: True for tokens that are never chosen, padding aside.
      key: of the draw; equal keys give equal masks.
      mask_id: the mask token.
      vocab_size: of the random tokens, which are any id of it, as in the original.

    Returns:
      See `Masked`; a row of special tokens alone has no prediction.
    """
    choose_key, put_key, random_key = jax.random.split(key, 3)
    free_bl = (tokens_bl != 0) & ~special_bl
    share_b = config.rate * jnp.sum(tokens_bl != 0, axis=1).astype(jnp.float32)
    share_b = jnp.ceil(share_b) if config.kind == "span" else jnp.round(share_b)
    width = config.width(tokens_bl.shape[1])
    budget_b = jnp.clip(share_b.astype(jnp.int32), 1, width)
    run_bl = _runs(config.kind, config.words, free_bl, starts_bl, budget_b, width, choose_key)
    chosen_bl = run_bl >= 0
    luck_bl = jax.random.uniform(put_key, tokens_bl.shape)
    if config.kind == "span":  # drawn once for the whole run
        luck_bl = jnp.take_along_axis(luck_bl, jnp.maximum(run_bl, 0), axis=1)
    any_bl = jax.random.randint(random_key, tokens_bl.shape, 0, vocab_size, tokens_bl.dtype)
    put_bl = jnp.where(luck_bl < config.mask_rate + config.random_rate, any_bl, tokens_bl)
    put_bl = jnp.where(luck_bl < config.mask_rate, mask_id, put_bl).astype(tokens_bl.dtype)
    # Chosen positions first, each in its order; the rest of the row is filled with position 0.
    order_bl = jnp.argsort(~chosen_bl, axis=1, stable=True)[:, :width]
    weights_bp = jnp.take_along_axis(chosen_bl, order_bl, axis=1)
    return Masked(
        tokens_bl=jnp.where(chosen_bl, put_bl, tokens_bl),
        positions_bp=jnp.where(weights_bp, order_bl, 0).astype(jnp.int32),
        labels_bp=jnp.where(weights_bp, jnp.take_along_axis(tokens_bl, order_bl, axis=1), 0),
        weights_bp=weights_bp.astype(jnp.float32),
        run_bl=run_bl,
    )


def _runs(
    kind: str,
    longest: int,
    free_bl: jax.Array,
    starts_bl: jax.Array,
    budget_b: jax.Array,
    width: int,
    key: jax.Array,
) -> jax.Array:
    """The number of the run that each token was chosen in, -1 where it was not.

    Each place is tried in turn. Tries are more than twice the greatest budget, so that hardly a
    row keeps some of its budget; a loop that ends by the rows would make devices wait for others.
    """
    order_key, size_key = jax.random.split(key)
    # A word ends where another begins, and at whatever may not be chosen.
    begins_bl = free_bl & (starts_bl | ~jnp.pad(free_bl[:, :-1], ((0, 0), (1, 0))))
    # A span may be hit anywhere in its first word, words and n-grams at their beginning.
    places_bl = begins_bl if kind in ("whole_word", "ngram") else free_bl
    noise_bl = jax.random.uniform(order_key, free_bl.shape)
    first_bl = jnp.argsort(jnp.where(places_bl, noise_bl, 2.0), axis=1)  # in a random order
    if kind == "token":
        rank_bl = jnp.argsort(first_bl, axis=1)
        return jnp.where(free_bl & (rank_bl < budget_b[:, None]), rank_bl, -1).astype(jnp.int32)
    at_1l = jnp.arange(free_bl.shape[1])[None]
    start_bl = jax.lax.cummax(jnp.where(begins_bl, at_1l, 0), axis=1)
    ends_blw = _ends(begins_bl, free_bl, longest)
    words_bl = _sizes(kind, longest, size_key, free_bl.shape)
    take = _take_span if kind == "span" else _take_words

    def attempt(number: jax.Array, state: _Runs) -> _Runs:
        place_b1 = jax.lax.dynamic_slice_in_dim(first_bl, number, 1, axis=1)
        words_b1 = jax.lax.dynamic_slice_in_dim(words_bl, number, 1, axis=1)
        at = functools.partial(jnp.take_along_axis, indices=place_b1, axis=1)
        ends_bw = jnp.take_along_axis(ends_blw, place_b1[:, :, None], axis=1)[:, 0]
        hit_b1 = at(places_bl) & (at(state.run_bl) < 0)
        left_b1 = (budget_b - state.used_b)[:, None]
        first_b1 = at(start_bl)
        end_b1 = take(first_b1, ends_bw, words_b1, left_b1, state.run_bl, at_1l)
        new_bl = hit_b1 & (left_b1 > 0) & (first_b1 <= at_1l) & (at_1l < end_b1)
        new_bl = new_bl & (state.run_bl < 0)
        count_b = jnp.sum(new_bl, axis=1)
        return _Runs(
            run_bl=jnp.where(new_bl, state.number_b[:, None], state.run_bl),
            used_b=state.used_b + count_b,
            number_b=state.number_b + (count_b > 0).astype(jnp.int32),
        )

    none_b = jnp.zeros_like(budget_b)
    begun = _Runs(jnp.full(free_bl.shape, -1, jnp.int32), none_b, none_b)
    done = jax.lax.fori_loop(0, min(free_bl.shape[1], 2 * width + _SPARE), attempt, begun)
    # The last span is cut at the budget, piece by piece; words and n-grams never go beyond it.
    last_bl = done.run_bl == (done.number_b - 1)[:, None]
    kept_b1 = (jnp.sum(last_bl, axis=1) - jnp.maximum(done.used_b - budget_b, 0))[:, None]
    return jnp.where(last_bl & (jnp.cumsum(last_bl, axis=1) > kept_b1), -1, done.run_bl)


class _Runs(NamedTuple):
    """The runs found so far, the number of their tokens, and their own number."""

    run_bl: jax.Array
    used_b: jax.Array
    number_b: jax.Array


def _take_span(
    first_b1: jax.Array,
    ends_bw: jax.Array,
    words_b1: jax.Array,
    left_b1: jax.Array,
    run_bl: jax.Array,
    at_1l: jax.Array,
) -> jax.Array:
    """Where the span of so many words ends; it may go over others and beyond the budget."""
    del first_b1, left_b1, run_bl, at_1l
    return jnp.take_along_axis(ends_bw, words_b1 - 1, axis=1)


def _take_words(
    first_b1: jax.Array,
    ends_bw: jax.Array,
    words_b1: jax.Array,
    left_b1: jax.Array,
    run_bl: jax.Array,
    at_1l: jax.Array,
) -> jax.Array:
    """Where the longest run ends that fits: of so many words or fewer, before any other run."""
    taken_bl = (run_bl >= 0) & (at_1l >= first_b1)
    next_b1 = jnp.min(jnp.where(taken_bl, at_1l, at_1l.shape[1]), axis=1, keepdims=True)
    number_1w = jnp.arange(ends_bw.shape[1])[None]
    fits_bw = (number_1w < words_b1) & (ends_bw <= next_b1) & (ends_bw - first_b1 <= left_b1)
    return jnp.max(jnp.where(fits_bw, ends_bw, first_b1), axis=1, keepdims=True)


def _ends(begins_bl: jax.Array, free_bl: jax.Array, words: int) -> jax.Array:
    """[b, l, words]: where a run of 1, 2, ... words ends that begins with the word of a place."""
    length = free_bl.shape[1]
    stops_bl = jnp.where(begins_bl | ~free_bl, jnp.arange(length)[None], length)
    after_bl = jax.lax.cummin(jnp.pad(stops_bl[:, 1:], ((0, 0), (0, 1)), constant_values=length),
                              axis=1, reverse=True)  # fmt: skip
    # What may not be chosen ends the run; so does the end of the row.
    next_bm = jnp.where(free_bl, after_bl, jnp.arange(length)[None])
    next_bm = jnp.pad(next_bm, ((0, 0), (0, 1)), constant_values=length)
    ends = [next_bm[:, :length]]
    for _ in range(words - 1):
        ends.append(jnp.take_along_axis(next_bm, ends[-1], axis=1))
    return jnp.stack(ends, axis=2)


def _sizes(kind: str, longest: int, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """How many words each of the rows' possible runs shall have."""
    words = np.arange(1, longest + 1)
    weights = _SPAN_P * (1 - _SPAN_P) ** (words - 1) if kind == "span" else 1.0 / words
    logits = jnp.asarray(np.log(weights), jnp.float32)
    return 1 + jax.random.categorical(key, logits, shape=shape).astype(jnp.int32)
