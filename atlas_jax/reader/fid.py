"""Fusion-in-Decoder (arXiv 2007.01282): passages are encoded apart and read together.

Pure functions of a ``T5``, its unboxed parameters and arrays. ``s`` is the fused source, k passages
of l tokens. There is dropout only if a key is given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer

from atlas_jax.core.partitioning import constrain, passage_rows
from atlas_jax.core.soft_prompts import prompt_length
from atlas_jax.core.types import EOS_ID, PAD_ID, Array, Params
from atlas_jax.reader.t5 import T5, copyable, pick_logprobs

MAX_LOGITS = 2**28  # vocabulary logits held at once by the per-passage scores (1 GiB)


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
    query_length = _length(query_tokens_bq)[..., None]
    passage_length = _length(passage_tokens_bkl)
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
    encoder and cross-attention, so it comes before `encode`. Rows that are all padding stay so.
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
    end = jnp.minimum(_length(tokens) + 1, width - 1)
    padded = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(1, 1)])[..., :width]
    place = jax.lax.broadcasted_iota(jnp.int32, padded.shape, padded.ndim - 1)
    blocks = jnp.where(place == 0, start_id, jnp.where(place < end, padded, PAD_ID))
    return jnp.where(place == end, eos_id, blocks)


def _length(tokens: jax.Array) -> jax.Array:
    """Number of tokens up to the last real one, [..., 1]; earlier ones may be hidden (0)."""
    place = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    return jnp.max(jnp.where(tokens != PAD_ID, place + 1, 0), axis=-1, keepdims=True)


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


def encode(
    model: T5,
    params: Params,
    tokens_bkl: Int[Array, "b k l"],
    dropout_key: jax.Array | None = None,
    apart_bkf: Float[Array, "b k f"] | None = None,
) -> Float[Array, "b k l d"]:
    """Encode each passage on its own, [b, k, l] -> [b, k, l, d].

    Args:
      apart_bkf: states from a pair encoder's lower layers (`encode_apart`) of the passages'
        blocks, which are the last m tokens of each input; m x d numbers in a row. None = these
        layers are run.
    """
    with passage_rows():
        return _encode_rows(model, params, tokens_bkl, dropout_key, apart_bkf)


def _encode_rows(
    model: T5,
    params: Params,
    tokens_bkl: jax.Array,
    dropout_key: jax.Array | None,
    apart_bkf: jax.Array | None,
) -> jax.Array:
    b, k, length = tokens_bkl.shape
    flat = constrain(tokens_bkl.reshape(b * k, length), "batch", "length")  # passages become rows
    if apart_bkf is None:
        enc = _apply(model, params, "encode", dropout_key, flat)
        return enc.reshape(b, k, length, -1)
    apart_bkmd = apart_bkf.reshape(b, k, -1, model.config.emb_dim)  # tokens apart again
    width = apart_bkmd.shape[2]
    query_bq = jnp.max(tokens_bkl[:, :, : length - width], axis=1)  # rows without a passage are 0
    query: Any = model.apply({"params": params}, query_bq, method="encode_apart")
    apart = apart_bkmd.astype(query.dtype)
    query = jnp.broadcast_to(query[:, None], (b, k, *query.shape[1:]))
    joined = jnp.concatenate([query, apart], axis=2).reshape(b * k, length, -1)
    enc = _apply(model, params, "encode_together", dropout_key, joined, flat)
    return enc.reshape(b, k, length, -1)


def encode_apart(
    model: T5, params: Params, passage_tokens: Integer[Array, "n l"], length: int
) -> Float[Array, "n m d"]:
    """A pair encoder's states of passages that do not depend on the question.

    Args:
      passage_tokens: [n, l], padded right, as in the store.
      length: tokens of a passage's block.

    Returns:
      [n, min(length, l + 2), d], for `encode`.
    """
    blocks = passage_blocks(passage_tokens, length, EOS_ID, model.config.start_id)
    states: Any = model.apply({"params": params}, blocks, method="encode_apart")
    return states


def fused_logits(
    model: T5,
    params: Params,
    enc_bkld: Float[Array, "b k l d"],
    tokens_bkl: Int[Array, "b k l"],
    targets_bt: Int[Array, "b t"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b t v"]:
    """Logits of the targets read from all passages at once, float32 [b, t, v].

    Args:
      enc_bkld: encoder states, see ``encode``.
      tokens_bkl: the tokens that they encode; they decide the mask.
      targets_bt: target tokens with their end token, padded on the right.
      dropout_key: of the decoder.
    """
    enc_bsd, mask_bs, copyable_bs = _fuse(model, enc_bkld, tokens_bkl)
    source = {"source_tokens_bs": copyable_bs} if model.config.pointer else {}
    return _apply(
        model, params, "decode", dropout_key, enc_bsd, mask_bs, shift_right(targets_bt), **source
    )


def fused_logprobs(
    model: T5,
    params: Params,
    enc_bkld: Float[Array, "b k l d"],
    tokens_bkl: Int[Array, "b k l"],
    targets_bt: Int[Array, "b t"],
    dropout_key: jax.Array | None = None,
    decoder_bt: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t"]:
    """Log-probability of each target token read from all passages at once, float32 [b, t].

    Args: as of ``fused_logits``; ``decoder_bt`` as of ``passage_logprobs``.
    """
    enc_bsd, mask_bs, copyable_bs = _fuse(model, enc_bkld, tokens_bkl)
    read = (enc_bsd, mask_bs[:, None], _inputs(targets_bt, decoder_bt)[:, None])
    states, _ = _apply(model, params, "decode_states", dropout_key, *read)
    return _target_logprobs(model, params, states, targets_bt[:, None], read, copyable_bs)[:, 0]


def passage_logprobs(
    model: T5,
    params: Params,
    enc_bkld: Float[Array, "b k l d"],
    tokens_bkl: Int[Array, "b k l"],
    targets_bt: Int[Array, "b t"],
    temperature: float = 1.0,
    decoder_bt: Int[Array, "b t"] | None = None,
) -> Float[Array, "b k t"]:
    """Log-probability of each target token read from each passage alone, without dropout.

    PDist takes it at temperature 1; EMDR2 divides the logits by its temperature.
    ``decoder_bt``, here and below, is what the decoder reads (see ``join_prompt``); None stands
    for the targets.

    Returns:
      float32 [b, k, t]: log_softmax(logits / temperature) at the target. Positions of
      padding in ``targets_bt`` mean nothing.
    """
    b, k, length, d = enc_bkld.shape
    enc = enc_bkld.reshape(b * k, length, d)  # every passage is a source of its own
    mask = (tokens_bkl != PAD_ID).reshape(b * k, 1, length)
    inputs = jnp.repeat(_inputs(targets_bt, decoder_bt), k, axis=0)[:, None]
    states, _ = _apply(model, params, "decode_states", None, enc, mask, inputs)

    def score(rows: Any) -> jax.Array:
        c, t = rows[1].shape[1:]
        # Passages become rows again, and the one target of each a variant.
        flat = jax.tree.map(lambda x: x.reshape(b * c, *x.shape[2:]), rows)
        states, targets, enc, mask, inputs, copied = flat
        logp: Any = model.apply(
            {"params": params},
            states[:, None], targets[:, None], enc, mask[:, None], inputs[:, None], copied,
            temperature,
            method="target_logprobs",
        )  # fmt: skip
        return logp.reshape(b, c, t)

    rows = (
        states.reshape(b, k, -1, states.shape[-1]),
        jnp.broadcast_to(targets_bt[:, None], (b, k, targets_bt.shape[1])),
        enc_bkld,
        tokens_bkl != PAD_ID,
        inputs.reshape(b, k, -1),
        copyable(tokens_bkl, model.config),
    )
    return _in_groups(model, score, rows)


def leave_one_out_logprobs(
    model: T5,
    params: Params,
    enc_bkld: Float[Array, "b k l d"],
    tokens_bkl: Int[Array, "b k l"],
    targets_bt: Int[Array, "b t"],
    decoder_bt: Int[Array, "b t"] | None = None,
) -> Float[Array, "b k t"]:
    """Log-probability of each target token read from all passages but one, without dropout.

    The k passes share the encoder states and their keys and values. Only the mask of the
    cross-attention differs (LOOP, arXiv 2208.03299, section 2.2). If the only real passage is
    left out, the decoder reads nothing.

    Returns:
      float32 [b, k, t], entry k with passage k left out.
    """
    b, k, length = tokens_bkl.shape
    enc_bsd, mask_bs, copyable_bs = _fuse(model, enc_bkld, tokens_bkl)
    others_kk = ~jnp.eye(k, dtype=bool)
    mask_bks = mask_bs[:, None, :] & jnp.repeat(others_kk, length, axis=1)[None]
    inputs_bt = _inputs(targets_bt, decoder_bt)
    inputs = jnp.broadcast_to(inputs_bt[:, None], (b, k, targets_bt.shape[1]))
    read = (enc_bsd, mask_bks, inputs)
    states, _ = _apply(model, params, "decode_states", None, *read)
    targets = jnp.broadcast_to(targets_bt[:, None], inputs.shape)
    return _target_logprobs(model, params, states, targets, read, copyable_bs)


def variant_logprobs(
    model: T5,
    params: Params,
    enc_bkld: Float[Array, "b k l d"],
    tokens_bkl: Int[Array, "b k l"],
    targets_brt: Int[Array, "b r t"],
    decoder_brt: Int[Array, "b r t"],
) -> Float[Array, "b r t"]:
    """Log-probability of each token of r targets a query, read from all passages, no dropout.

    The r targets share the encoder states and their keys and values.

    Returns:
      float32 [b, r, t]; ignore the values at padding in ``targets_brt``.
    """
    b, r, t = targets_brt.shape
    enc_bsd, mask_bs, copyable_bs = _fuse(model, enc_bkld, tokens_bkl)
    inputs = shift_right(decoder_brt.reshape(b * r, t)).reshape(b, r, t)  # variants as rows
    mask_brs = jnp.broadcast_to(mask_bs[:, None], (b, r, mask_bs.shape[1]))
    read = (enc_bsd, mask_brs, inputs)
    states, _ = _apply(model, params, "decode_states", None, *read)
    return _target_logprobs(model, params, states, targets_brt, read, copyable_bs)


def cross_attention_mass(
    model: T5,
    params: Params,
    enc_bkld: Float[Array, "b k l d"],
    tokens_bkl: Int[Array, "b k l"],
    targets_bt: Int[Array, "b t"],
    decoder_bt: Int[Array, "b t"] | None = None,
) -> Float[Array, "b k"]:
    """ADist's raw score of each passage, without dropout, float32 [b, k].

    Cross-attention probability (normalised over all passages) times the L2 norm of the value,
    averaged over heads, summed over layers, real target tokens and real source tokens.
    """
    enc_bsd, mask_bs, _ = _fuse(model, enc_bkld, tokens_bkl)
    _, mass_bs = _apply(
        model,
        params,
        "decode_states",
        None,
        enc_bsd,
        mask_bs[:, None],
        _inputs(targets_bt, decoder_bt)[:, None],
        weight_bt=targets_bt != PAD_ID,
    )
    return jnp.sum(jnp.where(mask_bs, mass_bs, 0.0).reshape(tokens_bkl.shape), axis=-1)


def target_loss(
    logits_btv: Float[Array, "b t v"], targets_bt: Int[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the real target tokens, see ``summed_loss``."""
    return summed_loss(pick_logprobs(logits_btv, targets_bt), targets_bt)


def summed_loss(
    logp_bt: Float[Array, "b t"], targets_bt: Int[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the real target tokens' negative log-probabilities.

    Returns:
      The sum, and how many tokens it sums over; two float32 scalars.
    """
    real_bt = targets_bt != PAD_ID
    return jnp.sum(jnp.where(real_bt, -logp_bt, 0.0)), jnp.sum(real_bt, dtype=jnp.float32)


def _inputs(targets_bt: jax.Array, decoder_bt: jax.Array | None) -> jax.Array:
    return shift_right(targets_bt if decoder_bt is None else decoder_bt)


def _fuse(
    model: T5, enc_bkld: jax.Array, tokens_bkl: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All passages as one source: its states, its mask and the tokens that may be copied."""
    b, k, length, d = enc_bkld.shape
    fused = enc_bkld.reshape(b, k * length, d)  # k passages become one source
    mask_bs = (tokens_bkl != PAD_ID).reshape(b, k * length)
    copyable_bs = copyable(tokens_bkl, model.config).reshape(b, k * length)
    return constrain(fused, "batch", "length", "embed"), mask_bs, copyable_bs


def _apply(
    model: T5, params: Params, method: str, dropout_key: jax.Array | None, *args: Any, **kwargs: Any
) -> Any:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(
        {"params": params}, *args, **kwargs, deterministic=rngs is None, rngs=rngs, method=method
    )


def _target_logprobs(
    model: T5,
    params: Params,
    states_brtd: jax.Array,
    targets_brt: jax.Array,
    read: tuple[jax.Array, jax.Array, jax.Array],
    copyable_bs: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """[b, r, t] log-probabilities of r targets a source.

    ``read``: source, mask and decoder input that the states were made from.
    """
    enc_bsd, mask_brs, inputs_brt = read

    def score(rows: Any) -> jax.Array:
        states, targets, mask, inputs = rows
        logp: Any = model.apply(
            {"params": params},
            states, targets, enc_bsd, mask, inputs, copyable_bs, temperature,
            method="target_logprobs",
        )  # fmt: skip
        return logp

    return _in_groups(model, score, (states_brtd, targets_brt, mask_brs, inputs_brt))


def _in_groups(model: T5, score: Callable[[Any], jax.Array], rows: Any) -> jax.Array:
    """Score arrays [b, r, ...] to [b, r, t], for a few of the r at once to limit the logits.

    The second array is the targets, [b, r, t].
    """
    b, r, t = rows[1].shape
    per_one = b * t * model.config.vocab_size
    limit = max(MAX_LOGITS, per_one)
    at_once = max(c for c in range(1, r + 1) if r % c == 0 and c * per_one <= limit)
    if at_once == r:
        return score(rows)

    def groups(x: jax.Array) -> jax.Array:
        return x.reshape(b, r // at_once, at_once, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(score, jax.tree.map(groups, rows))
    return parts.swapaxes(0, 1).reshape(b, r, t)
