"""Contrastive pretraining of the retriever (Contriever, arXiv 2112.09118): the pure parts.

A pair is two random crops of one document. The loss is InfoNCE over two kinds of
negatives: the other rows of the batch, and a queue of earlier keys (MoCo,
arXiv 1911.05722). Each kind can be left out, so MoCo and plain in-batch training are one loss.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Array, Params

_ABSENT = -1e30  # logit of a key that is no candidate; finite, so that gradients stay finite


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The defaults are Contriever's.

    Attributes:
        temperature: Divides the inner products.
        queue_size: Earlier keys kept as negatives; a multiple of the batch, or 0 for none.
        momentum: Keys come from a second encoder that follows the first,
            key <- momentum * key + (1 - momentum) * query, and gets no gradient. 0: no
            second encoder; keys are embedded by the passage tower itself, with gradient.
        in_batch: Whether the other keys of the batch are negatives too. Needed without a queue;
            MoCo uses the queue alone.
        deletion: Probability with which a token of a crop is left out.
        crop_min: Shortest crop as a share of the document.
        crop_max: Longest crop as a share of the document.
    """

    temperature: bounds.Positive = 0.05
    queue_size: bounds.AtLeast0 = 131072
    momentum: bounds.BelowOne = 0.9995
    in_batch: bool = False
    deletion: bounds.BelowOne = 0.1
    crop_min: bounds.Share = 0.1
    crop_max: bounds.Share = 0.5

    def __post_init__(self) -> None:
        """Raise `UserError`, naming the gin binding, when a field is out of range."""
        bounds.check(self)
        if self.queue_size == 0 and not self.in_batch:
            raise UserError(
                "ContrastiveConfig.queue_size = 0 and in_batch = False leave no negatives: "
                "set one of them"
            )
        if not 0 < self.crop_min <= self.crop_max <= 1:
            raise UserError(
                f"ContrastiveConfig.crop_min = {self.crop_min}, crop_max = {self.crop_max}: "
                "need 0 < crop_min <= crop_max <= 1"
            )


def crop_width(length: int, config: ContrastiveConfig) -> int:
    """Tokens in a crop of documents of up to `length`, both with two special tokens."""
    return 2 + max(1, math.ceil(config.crop_max * (length - 2)))


def crop(
    key: jax.Array, tokens_bl: Integer[Array, "b l"], config: ContrastiveConfig
) -> Int[Array, "b w"]:
    """Cut a random span out of each document, then leave out random tokens.

    The share of the document is uniform in [crop_min, crop_max], the place uniform; at
    least one token stays.

    Args:
        key: Randomness.
        tokens_bl: Documents with their first and last special token ([CLS] ... [SEP]), at
            least one token between them, pad 0.
        config: Crop shares and deletion probability.

    Returns:
        int32 [b, crop_width(l)], the crops between the same special tokens, pad 0.
    """
    tokens_bl = jnp.asarray(tokens_bl, jnp.int32)
    rows, length = tokens_bl.shape
    width = crop_width(length, config) - 2
    share_key, start_key, keep_key = jax.random.split(key, 3)
    real_b = jnp.sum(tokens_bl != PAD_ID, axis=1)
    content_b = jnp.maximum(real_b - 2, 1)

    share_b = jax.random.uniform(share_key, (rows,), minval=config.crop_min, maxval=config.crop_max)
    size_b = jnp.round(share_b * content_b.astype(jnp.float32)).astype(jnp.int32)
    size_b = jnp.clip(size_b, 1, width)
    start_b = jax.random.randint(start_key, (rows,), 0, content_b - size_b + 1)
    offset_1w = jnp.arange(width)[None]
    # + 1: content starts behind the first special token
    source_bw = jnp.minimum(1 + start_b[:, None] + offset_1w, length - 1)
    span_bw = jnp.take_along_axis(tokens_bl, source_bw, axis=1)

    inside_bw = offset_1w < size_b[:, None]
    kept_bw = inside_bw & jax.random.bernoulli(keep_key, 1 - config.deletion, (rows, width))
    none_b1 = ~jnp.any(kept_bw, axis=1, keepdims=True)
    kept_bw |= none_b1 & (offset_1w == 0)

    row_b1 = jnp.arange(rows)[:, None]
    # the first special token is at 0, so the n-th kept token goes to n; the rest is dropped
    place_bw = jnp.where(kept_bw, jnp.cumsum(kept_bw, axis=1), width + 2)
    out_bw = jnp.full((rows, width + 2), PAD_ID, jnp.int32).at[:, 0].set(tokens_bl[:, 0])
    out_bw = out_bw.at[row_b1, place_bw].set(span_bw, mode="drop")
    last_b1 = jnp.take_along_axis(tokens_bl, jnp.maximum(real_b - 1, 0)[:, None], axis=1)
    end_b1 = 1 + jnp.sum(kept_bw, axis=1, keepdims=True)
    return out_bw.at[row_b1, end_b1].set(last_b1)


def crop_pair(
    key: jax.Array, tokens_bl: Integer[Array, "b l"], config: ContrastiveConfig
) -> tuple[Int[Array, "b w"], Int[Array, "b w"]]:
    """Two independent crops of each document: a positive pair, see `crop`."""
    key_a, key_b = jax.random.split(key)
    return crop(key_a, tokens_bl, config), crop(key_b, tokens_bl, config)


@flax.struct.dataclass
class Queue:
    """Earlier keys, a ring.

    Attributes:
        keys_me: float32 embeddings.
        pointer: int32 scalar, the row that is written next.
        filled: int32 scalar, number of rows that hold a key; the others are not used.
    """

    keys_me: Array
    pointer: Array
    filled: Array


def empty_queue(size: int, embedding_dim: int) -> Queue | None:
    """Return a queue without keys; None for size 0 (checkpoints cannot hold empty arrays)."""
    if size == 0:
        return None
    return Queue(
        keys_me=jnp.zeros((size, embedding_dim), jnp.float32),
        pointer=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def push(
    queue: Queue | None, keys_be: Float[Array, "b e"], accept: Bool[Array, ""] | bool = True
) -> Queue | None:
    """Overwrite the oldest keys with a batch of new ones.

    Args:
        queue: None (no queue) stays None.
        keys_be: New keys; gradient stopped.
        accept: bool scalar; False leaves the queue as it is.

    Raises:
        UserError: The batch does not divide the queue.
    """
    if queue is None:
        return None
    size, batch = queue.keys_me.shape[0], keys_be.shape[0]
    if size % batch:
        raise UserError(
            f"ContrastiveConfig.queue_size = {size}: must be a multiple of the batch, {batch}"
        )
    old_be = jax.lax.dynamic_slice_in_dim(queue.keys_me, queue.pointer, batch)
    new_be = jnp.where(accept, jax.lax.stop_gradient(keys_be), old_be)
    step = jnp.where(accept, batch, 0)
    return Queue(
        keys_me=jax.lax.dynamic_update_slice_in_dim(queue.keys_me, new_be, queue.pointer, axis=0),
        pointer=(queue.pointer + step) % size,
        filled=jnp.minimum(queue.filled + step, size),
    )


def moco_loss(
    query_be: Float[Array, "b e"],
    key_be: Float[Array, "b e"],
    queue: Queue | None,
    temperature: float,
    in_batch: bool,
    hard_ce: Float[Array, "c e"] | None = None,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """InfoNCE: mean_i -log( exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum of negatives) ).

    Negatives of row i are the filled rows of the queue, its own hard negatives and, with
    `in_batch`, the keys and hard negatives of the other rows. Gradients flow into all
    arguments but the queue.

    Args:
        query_be: Queries.
        key_be: Their positives, row by row.
        queue: Earlier keys; None for no queue.
        temperature: T.
        in_batch: Whether other rows' keys and hard negatives are negatives.
        hard_ce: Hard negatives, c / b of them for each row: first those of row 0, then those of
            row 1 and so on; None for none.

    Returns:
        (float32 scalar loss, {'accuracy': share of rows whose positive scores highest}).
    """
    query_be = query_be.astype(jnp.float32) / temperature
    key_be = key_be.astype(jnp.float32)
    positive_b = jnp.sum(query_be * key_be, axis=-1)
    rows = query_be.shape[0]
    negative_b = jnp.full((rows,), _ABSENT)
    highest_b = jnp.full((rows,), _ABSENT)
    if in_batch:
        own_bb = jnp.eye(rows, dtype=bool)
        logits_bb = jnp.where(own_bb, _ABSENT, query_be @ key_be.T)
        negative_b = jax.nn.logsumexp(logits_bb, axis=-1)
        highest_b = jnp.max(logits_bb, axis=-1)
    if hard_ce is not None:
        owner_c = jnp.arange(hard_ce.shape[0]) // (hard_ce.shape[0] // rows)
        candidate_bc = in_batch | (owner_c[None] == jnp.arange(rows)[:, None])
        logits_bc = jnp.where(candidate_bc, query_be @ hard_ce.astype(jnp.float32).T, _ABSENT)
        negative_b = jnp.logaddexp(negative_b, jax.nn.logsumexp(logits_bc, axis=-1))
        highest_b = jnp.maximum(highest_b, jnp.max(logits_bc, axis=-1))
    if queue is not None:
        # the queue lies over all devices: gather the few queries, never the queue
        spread_be = constrain(query_be, None, "embedding")
        keys_me = constrain(jax.lax.stop_gradient(queue.keys_me), "index", "embedding")
        filled_1m = jnp.arange(keys_me.shape[0])[None] < queue.filled
        logits_bm = jnp.where(filled_1m, spread_be @ keys_me.T, _ABSENT)
        logits_bm = constrain(logits_bm, None, "index")
        negative_b = jnp.logaddexp(negative_b, jax.nn.logsumexp(logits_bm, axis=-1))
        highest_b = jnp.maximum(highest_b, jnp.max(logits_bm, axis=-1))
    # log(1 + exp(negative - positive)), which is exact also when the positive wins by far
    loss_b = jax.nn.softplus(negative_b - positive_b)
    accuracy = jnp.mean((positive_b > highest_b).astype(jnp.float32))
    return jnp.mean(loss_b), {"accuracy": accuracy}


def follow(slow: Params, fast: Params, momentum: float | Array) -> Params:
    """Move the key encoder: momentum * slow + (1 - momentum) * fast, leaf by leaf."""
    return jax.tree.map(lambda s, f: momentum * s + (1 - momentum) * f, slow, fast)
