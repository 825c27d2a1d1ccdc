"""A start from which a small reader learns to look things up: matching wired into fresh weights.

To answer, a reader has to find the place of a passage that shares most words with the
question. That takes three steps, each useless without the others, which is why training
alone finds them late. `reader/induction.py` wires copying; here is wired, in three layers of
the encoder and one of the decoder, where to begin:

* layer 0, head 1: is there a sentinel to the left? Then this is passage, else question
  (`question: .. answer: <extra_id_0> title: .. context: ..`);
* layer 1, head 1: is there the same token in the question? Tokens of a passage look at all
  tokens of the question, and at the sentinel where none is like them;
* layer 2, head 2: how many of the last few tokens had one;
* the decoder's first layer, cross-attention head 1: at a sentinel, look where most had one,
  and write the token that stands there.

What is passed on between these stands along directions of the residual stream that are kept free
of everything else. All weights stay trainable. Words that say much (`capital`) and little (`of`)
count alike at first; their weights, and that an answer begins behind a colon, are learnt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Params
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.induction import code_directions, head_columns

_LAYERS = 3  # of the encoder
_FREE = 16  # directions for the identity of tokens, at least
_NOWHERE = -30.0  # relative-position bias of places that a head shall not see

# How strongly every token carries the constant direction, and sentinels their own.
_CONSTANT, _SENTINEL = 2.0, 5.0
# Attention logits, each before the division by the stream's root mean square.
_SEEN = 20.0  # of a sentinel to the left
_SAME, _NONE, _BLOCK = 30.0, 25.0, 60.0  # of the same token, the sentinel, and not the question
_NEAR = 6.0  # bias of the last few places
# What is written along the directions.
_FLAG, _HIT, _WINDOW = 6.0, 6.0, 10.0
_LOOK, _COPY, _FORGET = 0.7, 8.0, 2.0


class _Directions(NamedTuple):
    """Unit vectors [emb_dim] of the residual stream, and the rest of it [rest, emb_dim]."""

    constant: np.ndarray  # of every token
    sentinel: np.ndarray  # of sentinels alone
    passage: np.ndarray  # a sentinel stands to the left
    hit: np.ndarray  # the token stands in the question too
    hits: np.ndarray  # share of the last few tokens that do
    free: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """[5, emb_dim]."""
        return np.stack(self[:5])


def wire_matching(
    params: Params, config: ReaderConfig, sentinels: Sequence[int], seed: int = 0
) -> Params:
    """Wire the lookup into parameters that `wire_induction` wired with the same seed.

    Args:
      params: of a T5 with unscanned layers; not changed.
      config: its sizes.
      sentinels: token ids of `<extra_id_0>` and so on.
      seed: of the directions; that of `wire_induction`.

    Returns:
      New parameters (numpy) of the same form.

    Raises:
      UserError: fewer than three layers in the encoder, or heads so wide that too little of the
        stream is left beside the codes of the induction start.
    """
    if config.num_encoder_layers < _LAYERS:
        raise UserError(
            f"ReaderConfig.num_encoder_layers = {config.num_encoder_layers}: the induction start "
            f"of the reader needs {_LAYERS} or more"
        )
    rest = code_directions(config, seed)[2 * config.head_dim :]
    if len(rest) < 5 + _FREE:
        raise UserError(
            f"ReaderConfig.head_dim = {config.head_dim}: the induction start of the reader needs "
            f"{(config.emb_dim - 5 - _FREE) // 2} or less where emb_dim is {config.emb_dim}"
        )
    along = _Directions(rest[0], rest[1], rest[2], rest[3], rest[4], free=rest[5:])
    params = jax.tree.map(np.array, params)
    encoder, decoder = params["encoder"], params["decoder"]
    embedding = params["token_embedder"]["embedding"]
    embedding -= embedding @ along.own.T @ along.own
    embedding += _CONSTANT * along.constant
    embedding[list(sentinels)] += _SENTINEL * along.sentinel
    _keep_free(encoder, config, along)
    _see_sentinel(encoder["layers_0"]["attention"], config, along)
    _match(encoder["layers_1"]["attention"], config, along, embedding, seed)
    _count(encoder["layers_2"]["attention"], config, along)
    table = encoder["relpos_bias"]["rel_embedding"]  # bucket i: i to the left; then to the right
    table[1, [0, *range(config.relpos_buckets // 2, config.relpos_buckets)]] = _NOWHERE
    table[2, : config.relpos_buckets // 4 + 1] = _NEAR
    _look(decoder["layers_0"]["encoder_decoder_attention"], config, along)
    last = decoder[f"layers_{config.num_decoder_layers - 1}"]["self_attention"]
    _forget_sentinel(last, config, along)
    return params


def _channel(config: ReaderConfig, number: int) -> np.ndarray:
    """One of a head's channels, [head_dim]."""
    return np.eye(config.head_dim, dtype=np.float32)[number]


def _silence(attention: Any, columns: slice, names: Sequence[str]) -> None:
    for name in names:
        attention[name]["kernel"][:, columns] = 0
    if "value" in names:
        attention["out"]["kernel"][columns] = 0


def _keep_free(encoder: Any, config: ReaderConfig, along: _Directions) -> None:
    """Let nothing else of the encoder write along the directions."""
    for i in range(config.num_encoder_layers):
        layer = encoder[f"layers_{i}"]
        for kernel in (layer["attention"]["out"]["kernel"], layer["mlp"]["wo"]["kernel"]):
            kernel -= kernel @ along.own.T @ along.own


def _see_sentinel(attention: Any, config: ReaderConfig, along: _Directions) -> None:
    """Head 1: flag what has a sentinel to its left; it starts as if hit, and so does a question."""
    columns, logit, carried = head_columns(config, 1), _channel(config, 0), _channel(config, 1)
    _silence(attention, columns, ("query", "key", "value"))
    scale = np.sqrt(_SEEN / (_CONSTANT * _SENTINEL))
    attention["query"]["kernel"][:, columns] = scale * np.outer(along.constant, logit)
    attention["key"]["kernel"][:, columns] = scale * np.outer(along.sentinel, logit)
    attention["value"]["kernel"][:, columns] = np.outer(along.sentinel, carried)
    written = (_FLAG * along.passage + _HIT * along.hit) / _SENTINEL
    attention["out"]["kernel"][columns] = np.outer(carried, written)


def _match(
    attention: Any, config: ReaderConfig, along: _Directions, embedding: np.ndarray, seed: int
) -> None:
    """Head 1: add a hit where the question holds the same token."""
    columns, logit, carried = head_columns(config, 1), _channel(config, 0), _channel(config, 1)
    gaussian = np.random.default_rng(seed + 1).normal(size=(len(along.free), config.head_dim))
    identity = (along.free.T @ gaussian).astype(np.float32)
    identity[:, :2] = 0  # the two channels
    identity *= np.sqrt(_SAME / np.mean(np.sum((embedding @ identity) ** 2, axis=1)))
    _silence(attention, columns, ("query", "key", "value"))
    constant = along.constant / _CONSTANT
    sentinel = along.sentinel / _SENTINEL
    attention["query"]["kernel"][:, columns] = identity + np.outer(constant, logit)
    attention["key"]["kernel"][:, columns] = identity + np.outer(
        _NONE * sentinel - _BLOCK / _FLAG * along.passage, logit
    )
    attention["value"]["kernel"][:, columns] = np.outer(constant - sentinel, carried)
    attention["out"]["kernel"][columns] = np.outer(carried, _HIT * along.hit)


def _count(attention: Any, config: ReaderConfig, along: _Directions) -> None:
    """Head 2, which attends evenly to the last few places: the share of hits."""
    columns, carried = head_columns(config, 2), _channel(config, 1)
    _silence(attention, columns, ("key", "value"))
    attention["query"]["kernel"][:, columns] *= 0.05
    attention["value"]["kernel"][:, columns] = np.outer(along.hit, carried)
    attention["out"]["kernel"][columns] = np.outer(carried, _WINDOW / _HIT * along.hits)


def _look(cross: Any, config: ReaderConfig, along: _Directions) -> None:
    """Head 1: from a sentinel to where most tokens were hit; write what stands there."""
    columns, logit = head_columns(config, 1), _channel(config, 0)
    cross["query"]["kernel"][:, columns] = _LOOK * np.outer(along.sentinel, logit)
    cross["key"]["kernel"][:, columns] = np.outer(along.hits, logit)
    cross["out"]["kernel"][columns] = _COPY * cross["value"]["kernel"][:, columns].T


def _forget_sentinel(attention: Any, config: ReaderConfig, along: _Directions) -> None:
    """Head 0, which sees the present token: write none of the sentinels after a sentinel."""
    channel = head_columns(config, 0).start + 1
    attention["value"]["kernel"][:, channel] = along.sentinel
    attention["out"]["kernel"][channel] = -_FORGET * along.sentinel
