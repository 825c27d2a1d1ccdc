"""Cached decoding with static shapes: greedy, beam search, sampling.

Keys and values of the source are computed once, and all beams of a query share them. Those of the
target are written in place, one position a step. The loop ends when every row has ended. For greedy
and beam search, tokens equal those of Hugging Face's ``generate`` for T5.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import PAD_ID, Array, Params
from atlas_jax.reader.stacks import DecodingState
from atlas_jax.reader.t5 import T5

NEVER = -1e9  # score of a hypothesis that may not be chosen


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are decoded.

    Attributes:
      max_length: tokens generated at most, the end token included; a prompt does not count.
      min_length: tokens generated before the end token may come; a prompt does not count.
      method: ``'greedy'``, ``'beam'`` or ``'sample'``.
      eos_id: the end token.
      num_beams: hypotheses kept per query (beam).
      length_penalty: finished hypotheses are ranked by log-probability divided by
        ``length ** length_penalty``; above 0 it favours long ones (beam).
      early_stopping: when a query's search ends, once it has ``num_beams`` finished hypotheses
        (beam). ``True``: at once. ``False``: when the best running hypothesis, scored at its
        present length, is worse than the worst finished one. ``'never'``: when it would be
        worse at any length up to ``max_length`` (exact if the penalty is not negative).
      beam_rules: the version of Hugging Face's transformers that beam search follows (beam).
        ``'v5'``: the candidates of the last step are finished and divided by their length.
        ``'v4.18'``, the version of the Atlas release: the running hypotheses are cut off and
        divided by their length plus one.
      temperature: divides the logits (sample).
      top_k: sample among the k likeliest tokens; 0 for all.
      top_p: sample among the likeliest tokens that together reach this probability.
      seed: from 0 to 2**32 - 1. A sampled answer depends on it and on the question's number in
        the run.
    """

    max_length: bounds.Length = 16
    min_length: bounds.AtLeast0 = 0
    method: Literal["greedy", "beam", "sample"] = "greedy"
    eos_id: bounds.AtLeast0 = 1
    num_beams: Annotated[int, Meta(ge=1, le=1024)] = 4
    length_penalty: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    early_stopping: bool | Literal["never"] = False
    beam_rules: Literal["v5", "v4.18"] = "v5"
    temperature: bounds.Positive = 1.0
    top_k: bounds.AtLeast0 = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: bounds.Seed = 0

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
          UserError: names the field, its value and what would be right.
        """
        bounds.check(self)
        if self.min_length >= self.max_length:
            raise UserError(
                f"GenerationConfig.min_length = {self.min_length!r}: must be from 0 to below "
                f"max_length = {self.max_length}"
            )


def generate(
    model: T5,
    params: Params,
    enc_bsd: Float[Array, "b s d"],
    enc_mask_bs: Bool[Array, "b s"],
    config: GenerationConfig,
    key: jax.Array | None = None,
    prompt_bp: Int[Array, "b p"] | None = None,
    copyable_bs: Int[Array, "b s"] | None = None,
) -> tuple[Int[Array, "b {config.max_length}"], Float[Array, " b"]]:
    """Decode one output per query. Pure; jit it with model and config closed over.

    Args:
      model: the reader.
      params: its unboxed parameters.
      enc_bsd: encoder states; for Fusion-in-Decoder the k * l states of all passages.
      enc_mask_bs: bool, real source positions.
      config: the method and its settings.
      key: randomness, for ``method='sample'``: a key for all queries, or keys [b].
      prompt_bp: int32 tokens that each output begins with, padded right; they are neither
        returned nor scored. None = no prompt.
      copyable_bs: tokens of the source that may be copied (`t5.copyable`), for a pointer.

    Returns:
      tokens_bt: int32 [b, max_length], the end token included where there is one, then
        padding (also in beam search, where Hugging Face pads T5 with its end token).
      scores_b: float32 log-probability of the tokens under the model (before temperature,
        restrictions and the minimum length); in beam search divided by length ** penalty.

    Raises:
      ValueError: sampling without a key.
    """
    variants = config.num_beams if config.method == "beam" else 1
    forced = _Forced.of(prompt_bp, enc_bsd.shape[0], config)
    decoding: Any = model.apply(
        {"params": params},
        enc_bsd,
        enc_mask_bs,
        variants,
        forced.width + config.max_length,
        copyable_bs,
        method="start_decoding",
    )
    step = functools.partial(model.apply, {"params": params}, method="step")
    if config.method == "beam":
        caches_axis = 1 if model.config.scan_layers else 0
        tokens_bt, scores_b = _beam_search(step, decoding, forced, caches_axis, config)
        return forced.remove(tokens_bt, config.max_length), scores_b
    if config.method == "sample" and key is None:
        raise ValueError("generate: method='sample' needs a key")

    def choose(logits_bv: jax.Array, index: jax.Array) -> jax.Array:
        if key is None or config.method == "greedy":
            return jnp.argmax(logits_bv, -1)
        kept = restrict(logits_bv / config.temperature, config.top_k, config.top_p)
        if not key.ndim:
            return jax.random.categorical(jax.random.fold_in(key, index), kept)
        keys_b = jax.vmap(jax.random.fold_in, (0, None))(key, index)
        return jax.vmap(jax.random.categorical)(keys_b, kept)

    tokens_bt, scores_b = _decode_rows(step, decoding, forced, config, choose)
    return forced.remove(tokens_bt, config.max_length), scores_b


@flax.struct.dataclass
class _Forced:
    """Forces the prompt's tokens, and forbids an end before the minimum length.

    Attributes:
      prompt_bp: tokens, padded right; p may be 0.
      length_b: tokens of each prompt.
      width: p.
    """

    prompt_bp: jax.Array
    length_b: jax.Array
    width: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, prompt_bp: jax.Array | None, b: int, config: GenerationConfig) -> "_Forced":
        if prompt_bp is None:
            prompt_bp = jnp.zeros((b, 0), jnp.int32)
        length_b = jnp.sum(prompt_bp != PAD_ID, axis=1, dtype=jnp.int32)
        return cls(prompt_bp=prompt_bp, length_b=length_b, width=prompt_bp.shape[1])

    def token_b(self, index: jax.Array) -> jax.Array:
        """The prompt's token at this position; padding after its end."""
        if not self.width:
            return jnp.full_like(self.length_b, PAD_ID)
        at = jnp.minimum(index, self.width - 1)
        token_b = jax.lax.dynamic_index_in_dim(self.prompt_bp, at, axis=1, keepdims=False)
        return jnp.where(index < self.length_b, token_b, PAD_ID)

    def is_last_b(self, index: jax.Array, config: GenerationConfig) -> jax.Array:
        """Whether the token at this position is the last that may be generated."""
        return index + 1 >= self.length_b + config.max_length

    def no_end(self, logits: jax.Array, index: jax.Array, config: GenerationConfig) -> jax.Array:
        """Logits or scores [b, ..., v] that forbid the end token while it is too early."""
        if not config.min_length:
            return logits
        early_b = index < self.length_b + config.min_length
        is_end = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == config.eos_id
        early = early_b.reshape(-1, *(1,) * (logits.ndim - 1))
        return jnp.where(early & is_end, NEVER, logits)

    def remove(self, tokens_bt: jax.Array, length: int) -> jax.Array:
        """The generated tokens alone, [b, length]."""
        if not self.width:
            return tokens_bt
        places = self.length_b[:, None] + jnp.arange(length)[None]
        return jnp.take_along_axis(tokens_bt, places, axis=1)


def restrict(logits_bv: Float[Array, "b v"], top_k: int, top_p: float) -> Float[Array, "b v"]:
    """Set the logits of tokens that may not be sampled to -inf.

    Args:
      logits_bv: after temperature.
      top_k: keep the k largest, 0 for all.
      top_p: of the tokens that top_k keeps, renormalised, keep the smallest set of likeliest
        tokens whose probability reaches top_p; the likeliest is always kept.

    Returns:
      float32 [b, v]. Ties with the last kept token are kept.
    """
    if 0 < top_k < logits_bv.shape[-1]:
        kth = jax.lax.top_k(logits_bv, top_k)[0][:, -1:]
        logits_bv = jnp.where(logits_bv < kth, -jnp.inf, logits_bv)
    if top_p < 1.0:
        descending = -jnp.sort(-logits_bv, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        lowest = jnp.take_along_axis(descending, jnp.maximum(last, 0), axis=-1)
        logits_bv = jnp.where(logits_bv < lowest, -jnp.inf, logits_bv)
    return logits_bv


def _decode_rows(
    step: Callable[..., Any],
    decoding: DecodingState,
    forced: _Forced,
    config: GenerationConfig,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """One hypothesis per query; ``choose`` maps logits and the step's number to tokens."""
    b, length = forced.length_b.shape[0], forced.width + config.max_length

    def unfinished(carry: Any) -> jax.Array:
        decoding, _, _, ended_b, _ = carry
        return (decoding.index < length) & ~jnp.all(ended_b)

    def body(carry: Any) -> Any:
        decoding, last_b, tokens_bt, ended_b, scores_b = carry
        index = decoding.index
        logits_bv, decoding = step(last_b, decoding)
        chosen_b = choose(forced.no_end(logits_bv, index, config), index).astype(jnp.int32)
        prompt_b = forced.token_b(index)
        in_prompt_b = prompt_b != PAD_ID
        chosen_b = jnp.where(in_prompt_b, prompt_b, chosen_b)
        picked_b = jnp.take_along_axis(logits_bv, chosen_b[:, None], axis=1)[:, 0]
        logprob_b = picked_b - jax.nn.logsumexp(logits_bv, axis=-1)
        scores_b = scores_b + jnp.where(ended_b | in_prompt_b, 0.0, logprob_b)
        chosen_b = jnp.where(ended_b, PAD_ID, chosen_b)
        tokens_bt = jax.lax.dynamic_update_slice_in_dim(tokens_bt, chosen_b[:, None], index, axis=1)
        ends_b = (chosen_b == config.eos_id) & ~in_prompt_b
        ended_b |= ends_b | forced.is_last_b(index, config)
        return decoding, chosen_b, tokens_bt, ended_b, scores_b

    start = (
        decoding,
        jnp.full((b,), PAD_ID, jnp.int32),  # T5 starts from the padding token
        jnp.full((b, length), PAD_ID, jnp.int32),
        jnp.zeros((b,), bool),
        jnp.zeros((b,), jnp.float32),
    )
    _, _, tokens_bt, _, scores_b = jax.lax.while_loop(unfinished, body, start)
    return tokens_bt, scores_b


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


def _beam_search(
    step: Callable[..., Any],
    decoding: DecodingState,
    forced: _Forced,
    caches_axis: int,
    config: GenerationConfig,
) -> tuple[jax.Array, jax.Array]:
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
    forced: _Forced,
    caches_axis: int,
    config: GenerationConfig,
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
    last_b = forced.is_last_b(index, config)
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
