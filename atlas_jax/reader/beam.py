"""Beam search over cached decoding, see `generate.generate`."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from atlas_jax.core.types import PAD_ID, Array
from atlas_jax.reader.forced import NEVER, Forced
from atlas_jax.reader.stacks import DecodingState

if TYPE_CHECKING:
    from atlas_jax.reader.generate import GenerationConfig


@flax.struct.dataclass
class _Beams:
    """Beam search between two steps; w is the beams of a query, best first.

    Attributes:
      last_bw: the newest token of each running hypothesis.
      running_bwt, running_scores_bw: hypotheses without end token and their log-probability.
      finished_bwt, finished_scores_bw: the best complete ones, length penalty applied.
      is_finished_bw: whether that place holds a complete hypothesis yet.
      open_b: whether a running hypothesis may still become one of the best.
    """

    decoding: DecodingState
    last_bw: jax.Array
    running_bwt: jax.Array
    running_scores_bw: jax.Array
    finished_bwt: jax.Array
    finished_scores_bw: jax.Array
    is_finished_bw: jax.Array
    open_b: jax.Array


def beam_search(
    step: Callable[..., Any],
    decoding: DecodingState,
    forced: Forced,
    caches_axis: int,
    config: "GenerationConfig",
) -> tuple[Int[Array, "b t"], Float[Array, " b"]]:
    """The best hypothesis of each query, the prompt included, and its score.

    Args:
      step: feeds one token per hypothesis, see `T5.step`.
      decoding: what it carries along, with ``num_beams`` hypotheses a query.
      caches_axis: axis of the caches that has the hypotheses.
    """
    b, w = forced.length_b.shape[0], config.num_beams
    length = forced.width + config.max_length

    def unfinished(beams: _Beams) -> jax.Array:
        going = (beams.decoding.index < length) & jnp.any(beams.open_b)
        if config.early_stopping is True:
            going &= ~jnp.all(beams.is_finished_bw)
        return going

    def body(beams: _Beams) -> _Beams:
        index = beams.decoding.index
        logits, decoding = step(beams.last_bw.reshape(b * w), beams.decoding)
        logprobs_bwv = jax.nn.log_softmax(logits, axis=-1).reshape(b, w, -1)
        logprobs_bwv = forced.no_end(logprobs_bwv, index, config)
        prompt_b11 = forced.token_b(index)[:, None, None]
        is_prompt_bwv = prompt_b11 == jnp.arange(logprobs_bwv.shape[-1])[None, None]
        only_prompt = jnp.where(is_prompt_bwv, 0.0, NEVER)  # certain, and so not scored
        logprobs_bwv = jnp.where(prompt_b11 != PAD_ID, only_prompt, logprobs_bwv)
        totals_bwv = logprobs_bwv + beams.running_scores_bw[..., None]
        return _advance(beams, decoding, totals_bwv, forced, caches_axis, config)

    empty_bwt = jnp.full((b, w, length), PAD_ID, jnp.int32)
    # All beams are equal before the first step: only the first may be continued.
    first_only = jnp.where(jnp.arange(w) == 0, 0.0, NEVER)
    start = _Beams(
        decoding=decoding,
        last_bw=jnp.full((b, w), PAD_ID, jnp.int32),  # T5 starts from the padding token
        running_bwt=empty_bwt,
        running_scores_bw=jnp.broadcast_to(first_only, (b, w)).astype(jnp.float32),
        finished_bwt=empty_bwt,
        finished_scores_bw=jnp.full((b, w), NEVER, jnp.float32),
        is_finished_bw=jnp.zeros((b, w), bool),
        open_b=jnp.ones((b,), bool),
    )
    beams = jax.lax.while_loop(unfinished, body, start)
    return beams.finished_bwt[:, 0], beams.finished_scores_bw[:, 0]


def _advance(
    beams: _Beams,
    decoding: DecodingState,
    totals_bwv: jax.Array,
    forced: Forced,
    caches_axis: int,
    config: "GenerationConfig",
) -> _Beams:
    """One step, given the log-probability of every continuation of every hypothesis."""
    b, w, v = totals_bwv.shape
    index = beams.decoding.index
    # 2 w candidates (c): at most w of them end, so at least w can continue.
    scores_bc, flat_bc = jax.lax.top_k(totals_bwv.reshape(b, w * v), 2 * w)
    origin_bc, token_bc = flat_bc // v, (flat_bc % v).astype(jnp.int32)
    candidates_bct = _pick(beams.running_bwt, origin_bc)
    candidates_bct = jax.lax.dynamic_update_slice_in_dim(
        candidates_bct, token_bc[..., None], index, axis=2
    )
    last_b = forced.is_last(index, config)
    ends_bc = token_bc == config.eos_id
    if config.beam_rules == "v5":
        ends_bc |= last_b[:, None]
    ends_bc &= (forced.token_b(index) == PAD_ID)[:, None]

    alive_scores, chosen_bw = jax.lax.top_k(jnp.where(ends_bc, scores_bc + NEVER, scores_bc), w)
    origin_bw = _pick(origin_bc, chosen_bw)
    caches = _reorder(decoding.self_caches, origin_bw, caches_axis)
    pointer = _reorder(decoding.pointer, origin_bw, 0)

    # Only an end among the w best counts; the other candidates are only there to continue.
    enters_bc = ends_bc & (jnp.arange(2 * w) < w)[None] & beams.open_b[:, None]
    if config.early_stopping is True:
        enters_bc &= ~jnp.all(beams.is_finished_bw, axis=1, keepdims=True)
    new_length_b1 = jnp.maximum(index + 1 - forced.length_b, 1).astype(jnp.float32)[:, None]
    penalised_bc = jnp.where(enters_bc, scores_bc / new_length_b1**config.length_penalty, NEVER)
    finished_scores, best_bw = jax.lax.top_k(
        jnp.concatenate([beams.finished_scores_bw, penalised_bc], axis=1), w
    )
    finished = _pick(jnp.concatenate([beams.finished_bwt, candidates_bct], axis=1), best_bw)
    is_finished = _pick(jnp.concatenate([beams.is_finished_bw, enters_bc], axis=1), best_bw)

    # The best score that the best hypothesis can reach, against the worst finished one.
    best_b1 = alive_scores[:, :1] if config.beam_rules == "v5" else scores_bc[:, :1]
    at_best = new_length_b1
    if config.early_stopping == "never" and config.length_penalty > 0:
        at_best = jnp.full_like(new_length_b1, config.max_length)
    hope_b1 = best_b1 / at_best**config.length_penalty
    worst_b1 = jnp.min(finished_scores, axis=1, keepdims=True)
    may_improve_b = jnp.any(hope_b1 > jnp.where(is_finished, worst_b1, NEVER), axis=1)
    beams = _Beams(
        decoding=dataclasses.replace(decoding, self_caches=caches, pointer=pointer),
        last_bw=_pick(token_bc, chosen_bw),
        running_bwt=_pick(candidates_bct, chosen_bw),
        running_scores_bw=alive_scores,
        finished_bwt=finished,
        finished_scores_bw=finished_scores,
        is_finished_bw=is_finished,
        open_b=beams.open_b & may_improve_b,
    )
    return beams if config.beam_rules == "v5" else _cut_off(beams, last_b, new_length_b1, config)


def _cut_off(beams: _Beams, last_b: jax.Array, length_b1: jax.Array, config: Any) -> _Beams:
    """Finish the running hypotheses of a query after its last step, as version 4.18 does.

    In that version the length of a hypothesis counts the start token but not the end token. So one
    that has ended is as long as its number of tokens. One that was cut off counts one token more.
    """
    open_b = beams.open_b
    if config.early_stopping is True:
        open_b &= ~jnp.all(beams.is_finished_bw, axis=1)
    enters_bw = (last_b & open_b)[:, None] & (beams.running_scores_bw > NEVER / 2)
    scores_bw = beams.running_scores_bw / (length_b1 + 1) ** config.length_penalty
    both = jnp.concatenate(
        [beams.finished_scores_bw, jnp.where(enters_bw, scores_bw, NEVER)], axis=1
    )
    scores_bw, best_bw = jax.lax.top_k(both, enters_bw.shape[1])
    texts = jnp.concatenate([beams.finished_bwt, beams.running_bwt], axis=1)
    return beams.replace(  # type: ignore[attr-defined]
        finished_bwt=_pick(texts, best_bw),
        finished_scores_bw=scores_bw,
        is_finished_bw=_pick(jnp.concatenate([beams.is_finished_bw, enters_bw], axis=1), best_bw),
        open_b=beams.open_b & ~last_b,
    )


def _pick(x: jax.Array, places: jax.Array) -> jax.Array:
    """[b, c, ...] and [b, w] places in c -> [b, w, ...]."""
    return jax.vmap(lambda row, at: row[at])(x, places)


def _reorder(caches: Any, origin_bw: jax.Array, axis: int) -> Any:
    """Give each running hypothesis the cache of the hypothesis that it continues.

    Args:
      caches: arrays with the b * w rows on the given axis.
      origin_bw: the beam that each beam continues.
    """
    b, w = origin_bw.shape

    def one(x: jax.Array) -> jax.Array:
        def rows(x: jax.Array) -> jax.Array:
            return _pick(x.reshape(b, w, *x.shape[1:]), origin_bw).reshape(x.shape)

        return jax.vmap(rows)(x) if axis else rows(x)

    return jax.tree.map(one, caches)
