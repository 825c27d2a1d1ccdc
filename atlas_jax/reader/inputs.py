"""What the reader is given: queries joined with passages, and the decoder's input."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Integer

from atlas_jax.core.packing import real_length
from atlas_jax.core.soft_prompts import prompt_length
from atlas_jax.core.types import PAD_ID, Array, Params
from atlas_jax.reader.t5 import T5


def join_inputs(
    query_tokens_bq: Int[Array, "b q"],
    passage_tokens_bkl: Integer[Array, "b k l"],
    mask_bk: Bool[Array, "b k"],
    length: int,
    eos_id: int,
    start_id: int = 0,
) -> Int[Array, "b k _"]:
    """Reader inputs: query tokens, passage tokens, end token.

    Args:
      query_tokens_bq: padded on the right, without end token.
      passage_tokens_bkl: padded on the right, without end token; any integer type.
      mask_bk: bool, the real passages.
      length: tokens per input; what does not fit is cut, the end token is kept.
      eos_id: the end token.
      start_id: above 0, make a pair encoder's two blocks (`pair_encoder`) with this token in front
        of each. A query then always takes its full width, so that the passage's places do not
        depend on the query.

    Returns:
      int32 [b, k, length]; rows of passages that are not real are all padding.
    """
    if start_id:
        return _join_blocks(query_tokens_bq, passage_tokens_bkl, mask_bk, length, eos_id, start_id)
    query_length = real_length(query_tokens_bq)[..., None]
    passage_length = real_length(passage_tokens_bkl)
    end = jnp.minimum(query_length + passage_length, length - 1)  # place of the end token
    position = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    from_query = jnp.take_along_axis(
        query_tokens_bq, jnp.minimum(position[0], query_tokens_bq.shape[1] - 1), axis=1, mode="clip"
    )[:, None, :]
    from_passage = jnp.take_along_axis(
        passage_tokens_bkl.astype(jnp.int32),
        jnp.clip(position - query_length, 0, passage_tokens_bkl.shape[2] - 1),
        axis=2,
        mode="clip",
    )
    tokens = jnp.where(position < query_length, from_query, from_passage)
    tokens = jnp.where(position < end, tokens, jnp.where(position == end, eos_id, PAD_ID))
    return jnp.where(mask_bk[..., None], tokens, PAD_ID).astype(jnp.int32)


def behind_prompt(
    model: T5, params: Params, tokens_bkl: Int[Array, "b k l"]
) -> Int[Array, "b k _"]:
    """Reader inputs behind the ids of the reader's prompt, [b, k, p + l], if it has one.

    These ids follow the vocabulary's. The prompt takes the places 0.. and is read as tokens are, by
    encoder and cross-attention, so it comes before `fid.encode`. Rows that are all padding stay so.
    """
    p = prompt_length(params, "token_embedder")
    if not p:
        return tokens_bkl
    soft_11p = model.config.vocab_size + jnp.arange(p, dtype=jnp.int32)[None, None]
    real_bk1 = jnp.any(tokens_bkl != PAD_ID, axis=-1, keepdims=True)
    return jnp.concatenate([jnp.where(real_bk1, soft_11p, PAD_ID), tokens_bkl], axis=-1)


def passage_blocks(
    passage_tokens: Integer[Array, "*rows l"], length: int, eos_id: int, start_id: int
) -> Int[Array, "*rows m"]:
    """The second block of a pair encoder's input: start token, passage, end token.

    Args:
      passage_tokens: [..., l], padded right.
      length: of a block; what does not fit is cut, the end token is kept.

    Returns:
      int32 [..., min(length, l + 2)].
    """
    tokens = passage_tokens.astype(jnp.int32)
    width = min(length, tokens.shape[-1] + 2)
    end = jnp.minimum(real_length(tokens) + 1, width - 1)
    padded = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(1, 1)])[..., :width]
    place = jax.lax.broadcasted_iota(jnp.int32, padded.shape, padded.ndim - 1)
    blocks = jnp.where(place == 0, start_id, jnp.where(place < end, padded, PAD_ID))
    return jnp.where(place == end, eos_id, blocks)


def hide(
    passage_tokens_bkl: Integer[Array, "b k l"],
    rows_bk: Int[Array, "b k"],
    hidden_b3: Int[Array, "b 3"] | None,
) -> Integer[Array, "b k l"]:
    """Replace the passages' tokens that `Batch.hidden_b3` names by padding."""
    if hidden_b3 is None:
        return passage_tokens_bkl
    row, first, last = (hidden_b3[:, i, None, None] for i in range(3))
    place = jnp.arange(passage_tokens_bkl.shape[2])[None, None]
    is_hidden = (rows_bk[..., None] == row) & (row >= 0) & (place >= first) & (place < last)
    return jnp.where(is_hidden, PAD_ID, passage_tokens_bkl)


def _join_blocks(
    query_tokens_bq: jax.Array,
    passage_tokens_bkl: jax.Array,
    mask_bk: jax.Array,
    length: int,
    eos_id: int,
    start_id: int,
) -> jax.Array:
    b, k, _ = passage_tokens_bkl.shape
    query_width = query_tokens_bq.shape[1] + 2
    query = passage_blocks(query_tokens_bq, query_width, eos_id, start_id)
    passage = passage_blocks(passage_tokens_bkl, length - query_width, eos_id, start_id)
    query = jnp.broadcast_to(query[:, None], (b, k, query_width))
    tokens = jnp.concatenate([query, passage], axis=2)
    return jnp.where(mask_bk[..., None], tokens, PAD_ID)


def shift_right(targets_bt: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Decoder inputs of teacher forcing: the targets one place later, padding id in front."""
    return jnp.pad(targets_bt, ((0, 0), (1, 0)), constant_values=PAD_ID)[:, :-1]


def join_prompt(
    prompt_tokens_bp: Int[Array, "b p"] | None, targets_bt: Int[Array, "b t"]
) -> tuple[Int[Array, "b u"], Int[Array, "b u"]]:
    """The decoder's input, and the targets in it.

    Args:
      prompt_tokens_bp: padded on the right; None = no prompt.
      targets_bt: target tokens with their end token, padded on the right.

    Returns:
      Two int32 arrays [b, p + t]: prompt and target without a gap, and the same with
      padding in place of the prompt. Without prompts, ``targets_bt`` twice.
    """
    if prompt_tokens_bp is None:
        return targets_bt, targets_bt
    prompt_b1 = jnp.sum(prompt_tokens_bp != PAD_ID, axis=1, dtype=jnp.int32)[:, None]
    position = jnp.arange(prompt_tokens_bp.shape[1] + targets_bt.shape[1], dtype=jnp.int32)[None]
    prompt = jnp.pad(prompt_tokens_bp, ((0, 0), (0, targets_bt.shape[1])))
    place = position - prompt_b1
    inside = (place >= 0) & (place < targets_bt.shape[1])
    target = jnp.take_along_axis(
        targets_bt, jnp.clip(place, 0, targets_bt.shape[1] - 1), axis=1, mode="clip"
    )
    target = jnp.where(inside, target, PAD_ID).astype(jnp.int32)
    return jnp.where(position < prompt_b1, prompt, target).astype(jnp.int32), target
