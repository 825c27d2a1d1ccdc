"""Cached decoding with static shapes: greedy, beam search, sampling.

Keys and values of the source are computed once, and all beams of a query share them. Those of the
target are written in place, one position a step, or in greedy decoding several (`lookup`). The loop
ends when every row has ended. For greedy and beam search, tokens equal those of Hugging Face's
``generate`` for T5.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import PAD_ID, Array, Params
from atlas_jax.reader.beam import beam_search
from atlas_jax.reader.forced import Forced
from atlas_jax.reader.lookup import write_by_lookup
from atlas_jax.reader.stacks import DecodingState
from atlas_jax.reader.t5 import T5


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are decoded.

    Attributes:
      max_length: tokens generated at most, the end token included; a prompt does not count.
      min_length: tokens generated before the end token may come; a prompt does not count.
      lookup_tokens: tokens that are copied from the source and tried in one call of the decoder
        (greedy; see `lookup`). The answers are those of 0, which tries none.
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
    lookup_tokens: Annotated[int, Meta(ge=0, le=64)] = 0
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
        if self.lookup_tokens and self.method != "greedy":
            raise UserError(
                f"GenerationConfig.lookup_tokens = {self.lookup_tokens}: must be 0 with "
                f"GenerationConfig.method = {self.method!r}; tokens from the passages are tried in "
                "greedy decoding alone"
            )

    def by(self, method: Literal["greedy", "beam", "sample"]) -> "GenerationConfig":
        """The same settings for another method."""
        lookup_tokens = self.lookup_tokens if method == "greedy" else 0
        return dataclasses.replace(self, method=method, lookup_tokens=lookup_tokens)


class Generated(NamedTuple):
    """What was decoded.

    Attributes:
      tokens_bt: int32, the end token included where there is one, then padding (also in beam
        search, where Hugging Face pads T5 with its end token).
      scores_b: float32 log-probability of the tokens under the model (before temperature,
        restrictions and the minimum length); in beam search divided by length ** penalty.
      calls_b: int32, how often the decoder was called for each; None for beam search.
    """

    tokens_bt: Int[Array, "b t"]
    scores_b: Float[Array, " b"]
    calls_b: Int[Array, " b"] | None = None


def generate(
    model: T5,
    params: Params,
    enc_bsd: Float[Array, "b s d"],
    enc_mask_bs: Bool[Array, "b s"],
    config: GenerationConfig,
    key: jax.Array | None = None,
    prompt_bp: Int[Array, "b p"] | None = None,
    copyable_bs: Int[Array, "b s"] | None = None,
) -> Generated:
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
      copyable_bs: tokens of the source that may be copied (`t5.copyable`), for a pointer and for
        ``lookup_tokens``.

    Raises:
      UserError: ``lookup_tokens`` with a reader that has experts.
      ValueError: sampling without a key, or ``lookup_tokens`` without ``copyable_bs``.
    """
    source = (enc_bsd, enc_mask_bs, config, prompt_bp, copyable_bs)
    if config.method == "beam":
        decoding, forced = _started(model, params, *source)
        step = functools.partial(model.apply, {"params": params}, method="step")
        caches_axis = 1 if model.config.scan_layers else 0
        tokens_bt, scores_b = beam_search(step, decoding, forced, caches_axis, config)
        return Generated(forced.remove(tokens_bt, config.max_length), scores_b)
    writing = write(model, params, start_writing(model, params, *source), config, key)
    return Generated(writing.tokens(config), writing.scores_b, writing.calls_b)


def _started(
    model: T5,
    params: Params,
    enc_bsd: jax.Array,
    enc_mask_bs: jax.Array,
    config: GenerationConfig,
    prompt_bp: jax.Array | None,
    copyable_bs: jax.Array | None,
) -> tuple[Any, Forced]:
    variants = config.num_beams if config.method == "beam" else 1
    forced = Forced.of(prompt_bp, enc_bsd.shape[0], config)
    # Tokens that are tried last may lie behind the end of the text.
    length = forced.width + config.max_length + config.lookup_tokens
    source = (enc_bsd, enc_mask_bs, variants, length, copyable_bs)
    return model.apply({"params": params}, *source, method="start_decoding"), forced


@flax.struct.dataclass
class Writing:
    """One text a query while it is written: greedy or sampled.

    Attributes:
      decoding: what the decoder carries along.
      forced: the prompts.
      last_b: the newest token of each text.
      written_bt: int32 tokens so far, the prompt included, then padding.
      ended_b: whether the text is complete.
      scores_b: float32 log-probability so far, see `generate`.
      calls_b: int32, how often the decoder was called for each text.
      source_bs: tokens that drafts are copied from; None without `lookup_tokens`.
    """

    decoding: DecodingState
    forced: Forced
    last_b: jax.Array
    written_bt: jax.Array
    ended_b: jax.Array
    scores_b: jax.Array
    calls_b: jax.Array
    source_bs: jax.Array | None = None

    def tokens(self, config: GenerationConfig) -> jax.Array:
        """The tokens so far without the prompts, [b, max_length]."""
        return self.forced.remove(self.written_bt, config.max_length)

    @property
    def reached(self) -> jax.Array:
        """Position up to which every unfinished text is written; the end if none is unfinished."""
        return jnp.min(jnp.where(self.ended_b, self.written_bt.shape[1], self.decoding.index))

    def apart(self) -> tuple[Any, Any]:
        """What stays as it is while the texts are written, and what changes with each token."""
        decoding = self.decoding
        changing = (decoding.index, decoding.self_caches, decoding.pointer)
        still = dataclasses.replace(decoding, index=None, self_caches=None, pointer=None)
        return (still, self.forced, self.source_bs), (changing, self.texts)

    @classmethod
    def joined(cls, still: Any, moving: Any) -> "Writing":
        """The inverse of `apart`."""
        (decoding, forced, source_bs), ((index, self_caches, pointer), texts) = still, moving
        whole = dataclasses.replace(decoding, index=index, self_caches=self_caches, pointer=pointer)
        last_b, written_bt, ended_b, scores_b, calls_b = texts
        return cls(whole, forced, last_b, written_bt, ended_b, scores_b, calls_b, source_bs)

    @property
    def texts(self) -> tuple[jax.Array, ...]:
        """The fields that change with each token beside `decoding`."""
        return self.last_b, self.written_bt, self.ended_b, self.scores_b, self.calls_b


def start_writing(
    model: T5,
    params: Params,
    enc_bsd: Float[Array, "b s d"],
    enc_mask_bs: Bool[Array, "b s"],
    config: GenerationConfig,
    prompt_bp: Int[Array, "b p"] | None = None,
    copyable_bs: Int[Array, "b s"] | None = None,
) -> Writing:
    """Texts of which nothing is written yet; the arguments are those of `generate`.

    Raises:
      UserError: ``lookup_tokens`` with a reader that has experts.
      ValueError: ``lookup_tokens`` without ``copyable_bs``.
    """
    if config.lookup_tokens and model.config.num_experts:
        raise UserError(
            f"GenerationConfig.lookup_tokens = {config.lookup_tokens}: must be 0 with "
            f"ReaderConfig.num_experts = {model.config.num_experts}; an expert has places for so "
            "many tokens of a call, so a draft could be read in another way than its tokens alone"
        )
    decoding, forced = _started(model, params, enc_bsd, enc_mask_bs, config, prompt_bp, copyable_bs)
    b, length = enc_bsd.shape[0], forced.width + config.max_length
    if config.lookup_tokens:
        if copyable_bs is None:
            raise ValueError("generate: lookup_tokens needs copyable_bs, the tokens of the source")
        decoding = dataclasses.replace(decoding, index=jnp.zeros((b,), jnp.int32))
    return Writing(
        decoding=decoding,
        forced=forced,
        last_b=jnp.full((b,), PAD_ID, jnp.int32),  # T5 starts from the padding token
        written_bt=jnp.full((b, length), PAD_ID, jnp.int32),
        ended_b=jnp.zeros((b,), bool),
        scores_b=jnp.zeros((b,), jnp.float32),
        calls_b=jnp.zeros((b,), jnp.int32),
        source_bs=copyable_bs if config.lookup_tokens else None,
    )


def write(
    model: T5,
    params: Params,
    writing: Writing,
    config: GenerationConfig,
    key: jax.Array | None = None,
    until: jax.Array | None = None,
) -> Writing:
    """Write on until every text is complete, or up to a position; one loop for both.

    Args:
      key: as in `generate`; the same for each part of a text.
      until: int32 scalar, the position at which to stop, the prompt counted; None = at the end.
        With ``lookup_tokens`` a text may then be written further.

    Raises:
      ValueError: sampling without a key.
    """
    if config.method == "sample" and key is None:
        raise ValueError("generate: method='sample' needs a key")
    if config.lookup_tokens:
        steps = functools.partial(model.apply, {"params": params}, method="steps")
        return write_by_lookup(steps, writing, config, until)
    step = functools.partial(model.apply, {"params": params}, method="step")

    def choose(logits_bv: jax.Array, index: jax.Array) -> jax.Array:
        if key is None or config.method == "greedy":
            return jnp.argmax(logits_bv, -1)
        kept = restrict(logits_bv / config.temperature, config.top_k, config.top_p)
        if not key.ndim:
            return jax.random.categorical(jax.random.fold_in(key, index), kept)
        keys_b = jax.vmap(jax.random.fold_in, (0, None))(key, index)
        return jax.vmap(jax.random.categorical)(keys_b, kept)

    return _decode_rows(step, writing, config, choose, until)


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
    writing: Writing,
    config: GenerationConfig,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    until: jax.Array | None,
) -> Writing:
    """One hypothesis per query; ``choose`` maps logits and the step's number to tokens."""
    forced, length = writing.forced, writing.written_bt.shape[1]

    def unfinished(carry: Any) -> jax.Array:
        decoding, _, _, ended_b, *_ = carry
        going = (decoding.index < length) & ~jnp.all(ended_b)
        return going if until is None else going & (decoding.index < until)

    def body(carry: Any) -> Any:
        decoding, last_b, tokens_bt, ended_b, scores_b, calls_b = carry
        index = decoding.index
        logits_bv, decoding = step(last_b, decoding)
        chosen_b = choose(forced.no_end(logits_bv, index, config), index).astype(jnp.int32)
        prompt_b = forced.token_b(index)
        in_prompt_b = prompt_b != PAD_ID
        chosen_b = jnp.where(in_prompt_b, prompt_b, chosen_b)
        picked_b = jnp.take_along_axis(logits_bv, chosen_b[:, None], axis=1)[:, 0]
        logprob_b = picked_b - jax.nn.logsumexp(logits_bv, axis=-1)
        scores_b = scores_b + jnp.where(ended_b | in_prompt_b, 0.0, logprob_b)
        calls_b = calls_b + (~ended_b).astype(jnp.int32)
        chosen_b = jnp.where(ended_b, PAD_ID, chosen_b)
        tokens_bt = jax.lax.dynamic_update_slice_in_dim(tokens_bt, chosen_b[:, None], index, axis=1)
        ends_b = (chosen_b == config.eos_id) & ~in_prompt_b
        ended_b |= ends_b | forced.is_last(index, config)
        return decoding, chosen_b, tokens_bt, ended_b, scores_b, calls_b

    start: Any = (writing.decoding, *writing.texts)
    decoding, *after = jax.lax.while_loop(unfinished, body, start)
    return Writing(decoding, forced, *after)
