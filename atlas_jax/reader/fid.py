"""Fusion-in-Decoder (arXiv 2007.01282): passages are encoded apart and read together.

Pure functions of a ``T5``, its unboxed parameters and arrays. ``s`` is the fused source,
k passages of l tokens. Dropout is on exactly where a key is given.
"""

from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Params
from atlas_jax.reader.t5 import T5

MAX_LOGITS = 2**28  # vocabulary logits held at once by the per-passage scores (1 GiB)


def join_inputs(
    query_tokens_bq: jax.Array,
    passage_tokens_bkl: jax.Array,
    mask_bk: jax.Array,
    length: int,
    eos_id: int,
) -> jax.Array:
    """Reader inputs: query tokens, passage tokens, end token.

    Args:
      query_tokens_bq: padded on the right, without end token.
      passage_tokens_bkl: padded on the right, without end token; any integer type.
      mask_bk: bool, the real passages.
      length: tokens per input; what does not fit is cut, the end token is kept.
      eos_id: the end token.

    Returns:
      int32 [b, k, length]; rows of passages that are not real are all padding.
    """
    query_length = jnp.sum(query_tokens_bq != PAD_ID, axis=1, dtype=jnp.int32)[:, None, None]
    passage_length = jnp.sum(passage_tokens_bkl != PAD_ID, axis=2, dtype=jnp.int32)[..., None]
    end = jnp.minimum(query_length + passage_length, length - 1)  # where the end token stands
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


def shift_right(targets_bt: jax.Array) -> jax.Array:
    """Decoder inputs of teacher forcing: the targets one place later, padding id in front."""
    return jnp.pad(targets_bt, ((0, 0), (1, 0)), constant_values=PAD_ID)[:, :-1]


def join_prompt(
    prompt_tokens_bp: jax.Array | None, targets_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the decoder is given, and what of it is a target.

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
    model: T5, params: Params, tokens_bkl: jax.Array, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Encode each passage on its own, [b, k, l] -> [b, k, l, d]."""
    b, k, length = tokens_bkl.shape
    flat = constrain(tokens_bkl.reshape(b * k, length), "batch", "length")  # passages become rows
    enc = _apply(model, params, "encode", dropout_key, flat)
    return enc.reshape(b, k, length, -1)


def fused_logits(
    model: T5,
    params: Params,
    enc_bkld: jax.Array,
    tokens_bkl: jax.Array,
    targets_bt: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Logits of the targets read from all passages at once, float32 [b, t, v].

    Args:
      enc_bkld: encoder states, see ``encode``.
      tokens_bkl: what they encode; decides the mask.
      targets_bt: target tokens with their end token, padded on the right.
      dropout_key: of the decoder.
    """
    enc_bsd, mask_bs = _fuse(enc_bkld, tokens_bkl)
    return _apply(model, params, "decode", dropout_key, enc_bsd, mask_bs, shift_right(targets_bt))


def passage_logprobs(
    model: T5,
    params: Params,
    enc_bkld: jax.Array,
    tokens_bkl: jax.Array,
    targets_bt: jax.Array,
    temperature: float = 1.0,
    decoder_bt: jax.Array | None = None,
) -> jax.Array:
    """Log-probability of each target token read from each passage alone, without dropout.

    PDist takes it at temperature 1; EMDR2 divides the logits by its temperature.
    ``decoder_bt``, here and below: what the decoder is given, see ``join_prompt``; the targets
    themselves if None.

    Returns:
      float32 [b, k, t]: log_softmax(logits / temperature) at the target. Positions of
      padding in ``targets_bt`` mean nothing.
    """
    b, k, length, d = enc_bkld.shape
    enc = enc_bkld.reshape(b * k, length, d)  # every passage is a source of its own
    inputs = jnp.repeat(_inputs(targets_bt, decoder_bt), k, axis=0)
    states, _ = _apply(
        model,
        params,
        "decode_states",
        None,
        enc,
        (tokens_bkl != PAD_ID).reshape(b * k, 1, length),
        inputs[:, None],
    )
    return _target_logprobs(
        model, params, states.reshape(b, k, -1, d), targets_bt[:, None], temperature
    )


def leave_one_out_logprobs(
    model: T5,
    params: Params,
    enc_bkld: jax.Array,
    tokens_bkl: jax.Array,
    targets_bt: jax.Array,
    decoder_bt: jax.Array | None = None,
) -> jax.Array:
    """Log-probability of each target token read from all passages but one, without dropout.

    The k passes share the encoder states and their keys and values, and differ in the mask of
    the cross-attention alone (LOOP, arXiv 2208.03299, section 2.2). Leaving out the only real
    passage leaves nothing to read.

    Returns:
      float32 [b, k, t], entry k with passage k left out.
    """
    b, k, length = tokens_bkl.shape
    enc_bsd, mask_bs = _fuse(enc_bkld, tokens_bkl)
    others_kk = ~jnp.eye(k, dtype=bool)
    mask_bks = mask_bs[:, None, :] & jnp.repeat(others_kk, length, axis=1)[None]
    inputs_bt = _inputs(targets_bt, decoder_bt)
    inputs = jnp.broadcast_to(inputs_bt[:, None], (b, k, targets_bt.shape[1]))
    states, _ = _apply(model, params, "decode_states", None, enc_bsd, mask_bks, inputs)
    return _target_logprobs(model, params, states, targets_bt[:, None], 1.0)


def variant_logprobs(
    model: T5,
    params: Params,
    enc_bkld: jax.Array,
    tokens_bkl: jax.Array,
    targets_brt: jax.Array,
    decoder_brt: jax.Array,
) -> jax.Array:
    """Log-probability of the tokens of r targets a query, read from all passages, no dropout.

    The r targets share the encoder states and their keys and values.

    Returns:
      float32 [b, r, t]; positions of padding in ``targets_brt`` mean nothing.
    """
    b, r, t = targets_brt.shape
    enc_bsd, mask_bs = _fuse(enc_bkld, tokens_bkl)
    inputs = shift_right(decoder_brt.reshape(b * r, t)).reshape(b, r, t)  # variants as rows
    mask_brs = jnp.broadcast_to(mask_bs[:, None], (b, r, mask_bs.shape[1]))
    states, _ = _apply(model, params, "decode_states", None, enc_bsd, mask_brs, inputs)
    return _target_logprobs(model, params, states, targets_brt, 1.0)


def cross_attention_mass(
    model: T5,
    params: Params,
    enc_bkld: jax.Array,
    tokens_bkl: jax.Array,
    targets_bt: jax.Array,
    decoder_bt: jax.Array | None = None,
) -> jax.Array:
    """ADist's raw score of each passage, without dropout, float32 [b, k].

    Cross-attention probability (normalised over all passages) times the L2 norm of the value,
    averaged over heads, summed over layers, real target tokens and real source tokens.
    """
    enc_bsd, mask_bs = _fuse(enc_bkld, tokens_bkl)
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


def target_loss(logits_btv: jax.Array, targets_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the real target tokens.

    Returns:
      Sum of negative log-likelihoods, and how many tokens it sums over; two float32 scalars.
    """
    real_bt = targets_bt != PAD_ID
    nll_bt = -_pick_logprobs(logits_btv, targets_bt)
    return jnp.sum(jnp.where(real_bt, nll_bt, 0.0)), jnp.sum(real_bt, dtype=jnp.float32)


def _inputs(targets_bt: jax.Array, decoder_bt: jax.Array | None) -> jax.Array:
    return shift_right(targets_bt if decoder_bt is None else decoder_bt)


def _fuse(enc_bkld: jax.Array, tokens_bkl: jax.Array) -> tuple[jax.Array, jax.Array]:
    b, k, length, d = enc_bkld.shape
    fused = enc_bkld.reshape(b, k * length, d)  # k passages become one source
    return constrain(fused, "batch", "length", "embed"), (tokens_bkl != PAD_ID).reshape(
        b, k * length
    )


def _apply(
    model: T5, params: Params, method: str, dropout_key: jax.Array | None, *args: Any, **kwargs: Any
) -> Any:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(
        {"params": params}, *args, **kwargs, deterministic=rngs is None, rngs=rngs, method=method
    )


def _target_logprobs(
    model: T5, params: Params, states_bktd: jax.Array, targets: jax.Array, temperature: float
) -> jax.Array:
    """[b, k, t] log-probabilities, over some passages at a time to bound the logits held.

    The targets are [b, k, t], or [b, 1, t] where all k have the same.
    """
    b, k, t, _ = states_bktd.shape
    per_passage = b * t * model.config.vocab_size
    limit = max(MAX_LOGITS, per_passage)
    at_once = max(c for c in range(1, k + 1) if k % c == 0 and c * per_passage <= limit)
    targets_bkt = jnp.broadcast_to(targets, (b, k, t))

    def score(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        states_bctd, targets_bct = part
        logits: Any = model.apply({"params": params}, states_bctd, method="logits")
        return _pick_logprobs(logits / temperature, targets_bct)

    if at_once == k:
        return score((states_bktd, targets_bkt))

    def groups(x: jax.Array) -> jax.Array:
        return x.reshape(b, k // at_once, at_once, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(score, (groups(states_bktd), groups(targets_bkt)))
    return parts.swapaxes(0, 1).reshape(b, k, t)


def _pick_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log_softmax(logits) at the targets, [..., v] and [...] -> [...]."""
    # Compared, not indexed: stays sharded over the vocabulary, and its gradient is no scatter.
    hit = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)
