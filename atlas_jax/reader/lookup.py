"""Greedy decoding of several tokens a call: drafts are copied from the source and then checked.

This is prompt lookup decoding: speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) whose
draft comes from no second model but from the text itself, as in inference with reference (Yang et
al. 2023, arXiv 2304.04487). Answers are often copied from a passage. So where the tokens written
last occur in a passage, those that follow there are taken as a draft. One call of the decoder reads
the last token and the draft, and gives the greedy choice behind each of them. As many tokens of the
draft are kept as agree with it, and one more: the choice behind the last that agrees.

The texts are those of greedy decoding, whatever the drafts are. Keys and values of tokens that are
not kept stay in the cache behind the position that the text has come to. The causal mask hides them
until the tokens that come there overwrite them. Each text of a batch has a position of its own, so
one may keep a whole draft while another keeps one token.

The choice behind a token is computed among several positions instead of one, so its logits may
differ in rounding. Where two tokens are equally likely to within that, the two ways may part.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from atlas_jax.core.types import PAD_ID, Array

if TYPE_CHECKING:
    from atlas_jax.reader.generate import GenerationConfig, Writing

LONGEST_MATCH = 3  # tokens written last that are looked for


def draft(
    source_bs: Int[Array, "b s"], written_bt: Int[Array, "b t"], length_b: Int[Array, " b"], d: int
) -> Int[Array, "b {d}"]:
    """What follows the last tokens of each text where they occur in the source.

    Of all places where the last token occurs, the one is taken before which the most of the
    `LONGEST_MATCH` last tokens stand; of equal ones the first, which is in the best passage.

    Args:
      source_bs: tokens of the source; 0 is never looked for.
      written_bt: the texts.
      length_b: tokens of each text so far.
      d: tokens of a draft.

    Returns:
      int32 [b, d]; 0 behind the source's end, and where the last token does not occur.
    """
    follows_bs, matched_bs = jnp.ones(source_bs.shape, bool), jnp.zeros(source_bs.shape, jnp.int32)
    for back in range(1, LONGEST_MATCH + 1):
        at_b1 = (length_b - back)[:, None]
        token_b1 = jnp.take_along_axis(written_bt, jnp.maximum(at_b1, 0), axis=1)
        is_token_bs = (source_bs == token_b1) & (token_b1 != PAD_ID) & (at_b1 >= 0)
        follows_bs &= jnp.pad(is_token_bs, ((0, 0), (back, 0)))[:, : source_bs.shape[1]]
        matched_bs += follows_bs.astype(jnp.int32)
    best_b1 = jnp.argmax(matched_bs, axis=1, keepdims=True)  # the first of equal ones
    places_bd = best_b1 + jnp.arange(d)[None]
    found_bd = jnp.take_along_axis(source_bs, places_bd, axis=1, mode="fill", fill_value=PAD_ID)
    return jnp.where(jnp.any(matched_bs > 0, axis=1, keepdims=True), found_bd, PAD_ID)


def write_by_lookup(
    steps: Callable[..., Any],
    writing: "Writing",
    config: "GenerationConfig",
    until: jax.Array | None,
) -> "Writing":
    """Write greedily, with drafts of ``config.lookup_tokens`` tokens; see `generate.write`.

    Args:
      steps: feeds several tokens per text, see `T5.steps`.
    """
    length = writing.written_bt.shape[1]
    limit = length if until is None else jnp.minimum(until, length)

    def unfinished(now: "Writing") -> jax.Array:
        return jnp.any(~now.ended_b & (now.decoding.index < limit))

    return jax.lax.while_loop(unfinished, lambda now: _call(steps, now, config), writing)


def _call(steps: Callable[..., Any], now: "Writing", config: "GenerationConfig") -> "Writing":
    """One call of the decoder; w is the last token and its draft."""
    forced, start_b, d = now.forced, now.decoding.index, config.lookup_tokens
    assert now.source_bs is not None
    places_bw = start_b[:, None] + jnp.arange(d + 1)[None]
    prompt_bw = forced.tokens(places_bw)
    in_prompt_bw = prompt_bw != PAD_ID
    draft_bd = draft(now.source_bs, now.written_bt, start_b, d)
    draft_bd = jnp.where(in_prompt_bw[:, :d], prompt_bw[:, :d], draft_bd)
    logits_bwv, decoding = steps(
        jnp.concatenate([now.last_b[:, None], draft_bd], axis=1), now.decoding
    )
    chosen_bw = jnp.argmax(forced.no_end(logits_bwv, places_bw, config), -1).astype(jnp.int32)
    chosen_bw = jnp.where(in_prompt_bw, prompt_bw, chosen_bw)

    ends_bw = (chosen_bw == config.eos_id) & ~in_prompt_bw
    ends_bw |= forced.is_last(places_bw, config)
    # A choice counts if all of the draft before it is right and the text has not ended there.
    goes_on_bd = (chosen_bw[:, :d] == draft_bd) & ~ends_bw[:, :d]
    before_bw = jnp.pad(goes_on_bd, ((0, 0), (1, 0)), constant_values=True)
    kept_bw = jnp.cumprod(before_bw.astype(jnp.int32), axis=1).astype(bool) & ~now.ended_b[:, None]
    count_b = jnp.sum(kept_bw, axis=1, dtype=jnp.int32)

    picked_bw = jnp.take_along_axis(logits_bwv, chosen_bw[..., None], axis=2)[..., 0]
    logprob_bw = picked_bw - jax.nn.logsumexp(logits_bwv, axis=-1)
    last_b1 = jnp.take_along_axis(chosen_bw, jnp.maximum(count_b - 1, 0)[:, None], axis=1)
    return now.replace(  # type: ignore[attr-defined]
        decoding=decoding.keep(count_b),
        last_b=jnp.where(count_b > 0, last_b1[:, 0], PAD_ID),
        written_bt=_written(now.written_bt, chosen_bw, start_b, count_b),
        ended_b=now.ended_b | jnp.any(kept_bw & ends_bw, axis=1),
        scores_b=now.scores_b + jnp.sum(logprob_bw, axis=1, where=kept_bw & ~in_prompt_bw),
        calls_b=now.calls_b + (~now.ended_b).astype(jnp.int32),
    )


def _written(
    written_bt: jax.Array, chosen_bw: jax.Array, start_b: jax.Array, count_b: jax.Array
) -> jax.Array:
    """The texts with the first ``count_b`` chosen tokens from ``start_b`` on."""
    place_bt = jnp.arange(written_bt.shape[1])[None] - start_b[:, None]
    new_bt = jnp.take_along_axis(chosen_bw, jnp.clip(place_bt, 0, chosen_bw.shape[1] - 1), axis=1)
    return jnp.where((place_bt >= 0) & (place_bt < count_b[:, None]), new_bt, written_bt)
