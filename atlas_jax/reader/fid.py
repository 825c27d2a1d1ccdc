"""Fusion-in-Decoder (arXiv 2007.01282): passages are encoded apart and read together.

Pure functions of a ``T5``, its unboxed parameters and arrays. The inputs are g rows of l tokens a
query: one row for each of its k passages, or fewer rows that several passages share (`packing`).
``s`` is the fused source, g * l positions. There is dropout only if a key is given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer

from atlas_jax.core.experts import Routed, routed_apply
from atlas_jax.core.packing import Inputs, Packed, passage_masks, tokens_of
from atlas_jax.core.partitioning import constrain, passage_rows
from atlas_jax.core.types import EOS_ID, PAD_ID, Array, Params
from atlas_jax.reader.inputs import passage_blocks, shift_right
from atlas_jax.reader.t5 import T5, copyable

MAX_LOGITS = 2**28  # vocabulary logits held at once by the per-passage scores (1 GiB)


def encode(
    model: T5,
    params: Params,
    inputs: Inputs,
    dropout_key: jax.Array | None = None,
    apart_bkf: Float[Array, "b k f"] | None = None,
    routed: Routed | None = None,
) -> Float[Array, "b g l d"]:
    """Encode each passage on its own: states of all rows, [b, g, l, d].

    Dropout draws one mask for all positions of a row (`stacks.dropout`), so passages that share a
    row share it.

    Args:
      apart_bkf: states from a pair encoder's lower layers (`encode_apart`) of the passages'
        blocks, which are the last m tokens of each input; m x d numbers in a row. None = these
        layers are run.
      routed: gets what the routers of Switch layers decide.
    """
    with passage_rows():
        return _encode_rows(model, params, inputs, dropout_key, apart_bkf, routed)


def _encode_rows(
    model: T5,
    params: Params,
    inputs: Inputs,
    dropout_key: jax.Array | None,
    apart_bkf: jax.Array | None,
    routed: Routed | None,
) -> jax.Array:
    tokens_bkl = tokens_of(inputs)
    b, k, length = tokens_bkl.shape
    flat = constrain(tokens_bkl.reshape(b * k, length), "batch", "length")  # passages become rows
    if apart_bkf is None:
        segments = None
        if isinstance(inputs, Packed):
            segments = constrain(inputs.segments_bgl.reshape(b * k, length), "batch", "length")
        args = (model, params, "encode", dropout_key, flat)
        enc = routed_apply(_apply, routed, flat != PAD_ID, *args, segments_nl=segments)
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


def fuse(
    model: T5, enc_bgld: Float[Array, "b g l d"], inputs: Inputs
) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"], Int[Array, "b s"]]:
    """All passages as one source: its states, its mask and the tokens that may be copied.

    Args:
      enc_bgld: of ``encode``.
      inputs: what it encodes.
    """
    b, rows, length, d = enc_bgld.shape
    tokens = tokens_of(inputs)
    fused = enc_bgld.reshape(b, rows * length, d)  # all rows of a query become one source
    mask_bs = (tokens != PAD_ID).reshape(b, rows * length)
    copyable_bs = copyable(tokens, model.config).reshape(b, rows * length)
    return constrain(fused, "batch", "source", "embed"), mask_bs, copyable_bs


def fused_logits(
    model: T5,
    params: Params,
    enc_bgld: Float[Array, "b g l d"],
    inputs: Inputs,
    targets_bt: Int[Array, "b t"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b t v"]:
    """Logits of the targets read from all passages at once, float32 [b, t, v].

    Args:
      enc_bgld: encoder states, see ``encode``.
      inputs: what they encode; its tokens decide the mask.
      targets_bt: target tokens with their end token, padded on the right.
      dropout_key: of the decoder.
    """
    enc_bsd, mask_bs, copyable_bs = fuse(model, enc_bgld, inputs)
    source = {"source_tokens_bs": copyable_bs} if model.config.pointer else {}
    return _apply(
        model, params, "decode", dropout_key, enc_bsd, mask_bs, shift_right(targets_bt), **source
    )


def fused_logprobs(
    model: T5,
    params: Params,
    enc_bgld: Float[Array, "b g l d"],
    inputs: Inputs,
    targets_bt: Int[Array, "b t"],
    dropout_key: jax.Array | None = None,
    decoder_bt: Int[Array, "b t"] | None = None,
    routed: Routed | None = None,
) -> Float[Array, "b t"]:
    """Log-probability of each target token read from all passages at once, float32 [b, t].

    Args: as of ``fused_logits``; ``decoder_bt`` as of ``passage_logprobs``; ``routed`` as of
      ``encode``.
    """
    enc_bsd, mask_bs, copyable_bs = fuse(model, enc_bgld, inputs)
    read = (enc_bsd, mask_bs[:, None], _inputs(targets_bt, decoder_bt)[:, None])
    real_bt = (targets_bt if decoder_bt is None else decoder_bt) != PAD_ID
    decoding = (model, params, "decode_states", dropout_key, *read)
    states, _ = routed_apply(_apply, routed, real_bt, *decoding)
    return _target_logprobs(model, params, states, targets_bt[:, None], read, copyable_bs)[:, 0]


def passage_logprobs(
    model: T5,
    params: Params,
    enc_bgld: Float[Array, "b g l d"],
    inputs: Inputs,
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
    if isinstance(inputs, Packed):  # the passages share the keys and values of their query's rows
        source = (model, params, enc_bgld, inputs, passage_masks(inputs))
        return _masked_logprobs(*source, targets_bt, decoder_bt, temperature)
    b, k, length, d = enc_bgld.shape
    enc = enc_bgld.reshape(b * k, length, d)  # every passage is a source of its own
    mask = (inputs != PAD_ID).reshape(b * k, 1, length)
    decoded = jnp.repeat(_inputs(targets_bt, decoder_bt), k, axis=0)[:, None]
    states, _ = _apply(model, params, "decode_states", None, enc, mask, decoded)

    def score(rows: Any) -> jax.Array:
        c, t = rows[1].shape[1:]
        # Passages become rows again, and the one target of each a variant.
        flat = jax.tree.map(lambda x: x.reshape(b * c, *x.shape[2:]), rows)
        states, targets, enc, mask, decoded, copied = flat
        logp: Any = model.apply(
            {"params": params},
            states[:, None], targets[:, None], enc, mask[:, None], decoded[:, None], copied,
            temperature,
            method="target_logprobs",
        )  # fmt: skip
        return logp.reshape(b, c, t)

    rows = (
        states.reshape(b, k, -1, states.shape[-1]),
        jnp.broadcast_to(targets_bt[:, None], (b, k, targets_bt.shape[1])),
        enc_bgld,
        inputs != PAD_ID,
        decoded.reshape(b, k, -1),
        copyable(inputs, model.config),
    )
    return _in_groups(model, score, rows)


def leave_one_out_logprobs(
    model: T5,
    params: Params,
    enc_bgld: Float[Array, "b g l d"],
    inputs: Inputs,
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
    masks_bks = passage_masks(inputs)
    others_bks = jnp.any(masks_bks, axis=1, keepdims=True) & ~masks_bks
    return _masked_logprobs(model, params, enc_bgld, inputs, others_bks, targets_bt, decoder_bt)


def _masked_logprobs(
    model: T5,
    params: Params,
    enc_bgld: jax.Array,
    inputs: Inputs,
    mask_bks: jax.Array,
    targets_bt: jax.Array,
    decoder_bt: jax.Array | None,
    temperature: float = 1.0,
) -> jax.Array:
    """[b, k, t] log-probabilities of one target, read k times from parts of one source."""
    b, k, _ = mask_bks.shape
    enc_bsd, _, copyable_bs = fuse(model, enc_bgld, inputs)
    inputs_bt = _inputs(targets_bt, decoder_bt)
    inputs_bkt = jnp.broadcast_to(inputs_bt[:, None], (b, k, targets_bt.shape[1]))
    read = (enc_bsd, mask_bks, inputs_bkt)
    states, _ = _apply(model, params, "decode_states", None, *read)
    targets = jnp.broadcast_to(targets_bt[:, None], inputs_bkt.shape)
    return _target_logprobs(model, params, states, targets, read, copyable_bs, temperature)


def variant_logprobs(
    model: T5,
    params: Params,
    enc_bgld: Float[Array, "b g l d"],
    inputs: Inputs,
    targets_brt: Int[Array, "b r t"],
    decoder_brt: Int[Array, "b r t"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b r t"]:
    """Log-probability of each token of r targets a query, read from all passages.

    The r targets share the encoder states and their keys and values.

    Returns:
      float32 [b, r, t]; ignore the values at padding in ``targets_brt``.
    """
    b, r, t = targets_brt.shape
    enc_bsd, mask_bs, copyable_bs = fuse(model, enc_bgld, inputs)
    inputs = shift_right(decoder_brt.reshape(b * r, t)).reshape(b, r, t)  # variants as rows
    mask_brs = jnp.broadcast_to(mask_bs[:, None], (b, r, mask_bs.shape[1]))
    read = (enc_bsd, mask_brs, inputs)
    states, _ = _apply(model, params, "decode_states", dropout_key, *read)
    return _target_logprobs(model, params, states, targets_brt, read, copyable_bs)


def cross_attention_mass(
    model: T5,
    params: Params,
    enc_bgld: Float[Array, "b g l d"],
    inputs: Inputs,
    targets_bt: Int[Array, "b t"],
    decoder_bt: Int[Array, "b t"] | None = None,
) -> Float[Array, "b k"]:
    """ADist's raw score of each passage, without dropout, float32 [b, k].

    Cross-attention probability (normalised over all passages) times the L2 norm of the value,
    averaged over heads, summed over layers, real target tokens and real source tokens.
    """
    enc_bsd, mask_bs, _ = fuse(model, enc_bgld, inputs)
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
    return jnp.sum(jnp.where(passage_masks(inputs), mass_bs[:, None], 0.0), axis=-1)


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
