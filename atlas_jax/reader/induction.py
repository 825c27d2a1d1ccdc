"""Initial weights with which a small reader learns to copy quickly: a wired induction circuit.

A randomly initialised reader of a few million parameters needs very many examples before it copies
anything from its source. The circuit that copies is known: a previous-token head and an induction
head (Elhage et al. 2021, Olsson et al. 2022). To initialise attention with the structure that
training would find is called "mimetic" initialisation (Trockman and Kolter, arXiv 2305.09828).
Here:

* In the encoder, the relative-position table directs four heads. Head 0 looks at the token before,
  head 3 at the token before that, head 1 at other places of the same token, head 2 at a few tokens
  to the left.
* The first encoder layer writes the values of heads 0 and 3 along two directions of their own.
* In the decoder's first layer, self-attention head 1 writes the previous token in the same way.
  Cross-attention head 0 finds the place after the last two tokens and writes its token into the
  output. It uses two tokens because digits and short pieces repeat: in text of the World Factbook,
  one token leaves the next open in 29 % of all places, two tokens in 7 %.
* The last decoder layer removes the present token, which tied embeddings would repeat.

All weights can be trained; this only decides where training starts.
"""

from typing import Any

import jax
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Params
from atlas_jax.reader.config import ReaderConfig

_QUIET = 0.1  # factor on query kernels of heads that look only at positions
_SHARP = 8.0  # relative-position bias of such a head
# Factors on the output of all other parts, so that the circuit dominates at the start.
_MURMUR = 0.4
_MLP = {"encoder": 0.3, "decoder": 0.5}
_HEADS = 4  # heads that the circuit uses


def wire_induction(
    params: Params, config: ReaderConfig, seed: int = 0, match: float = 0.4, copy: float = 8.0
) -> Params:
    """Wire copying into freshly initialised parameters.

    Args:
      params: of a T5 with unscanned layers, as initialised; not changed.
      config: its sizes; at least four heads, embeddings tied to the output.
      seed: of the few directions drawn here.
      match: how sharply the induction head matches tokens.
      copy: how strongly cross-attention writes what it finds.

    Returns:
      New parameters (numpy) of the same form.

    Raises:
      UserError: scanned layers, fewer than four heads, heads wider than half of the stream,
        or an output matrix of its own.
    """
    for field, fits, expected in (
        ("scan_layers", not config.scan_layers, "False"),
        ("num_heads", config.num_heads >= _HEADS, f"{_HEADS} or more"),
        ("head_dim", 2 * config.head_dim <= config.emb_dim, f"{config.emb_dim // 2} or less"),
        ("logits_via_embedding", config.logits_via_embedding, "True"),
    ):
        if not fits:
            raise UserError(
                f"ReaderConfig.{field} = {getattr(config, field)}: the induction start of the "
                f"reader needs {expected}"
            )
    params = jax.tree.map(np.array, params)
    gaussian = np.random.default_rng(seed).normal(size=(config.emb_dim, config.emb_dim))
    directions, _ = np.linalg.qr(gaussian)
    # Where the encoder's heads 0 and 3 write: [head_dim, emb_dim] each, at right angles.
    before, two_before = directions.astype(np.float32)[: 2 * config.head_dim].reshape(
        2, config.head_dim, config.emb_dim
    )
    _wire_encoder(params["encoder"], config, before, two_before)
    codes = params["encoder"]["layers_0"]["attention"]["value"]["kernel"]
    _wire_lookup(params["decoder"], config, codes, before, two_before, match)
    _wire_output(params["decoder"], config, copy)
    return params


def _head(config: ReaderConfig, number: int) -> slice:
    """The columns of one head among those of all heads."""
    return slice(number * config.head_dim, (number + 1) * config.head_dim)


def _wire_encoder(
    encoder: Any, config: ReaderConfig, before: np.ndarray, two_before: np.ndarray
) -> None:
    """Wire the heads that look at positions, and damp the blocks so that tokens stay visible."""
    near = config.relpos_buckets // 4  # buckets of one distance each, to the left
    table = encoder["relpos_bias"]["rel_embedding"]  # [heads, buckets]; bucket i: i to the left
    table[:] = 0
    table[0, 1] = _SHARP
    table[1, 0] = -6
    table[2, 1:near] = 3
    table[3, 2] = _SHARP
    for i in range(config.num_encoder_layers):
        layer = encoder[f"layers_{i}"]
        query, key = (layer["attention"][name]["kernel"] for name in ("query", "key"))
        layer["attention"]["out"]["kernel"] *= _MURMUR
        layer["mlp"]["wo"]["kernel"] *= _MLP["encoder"]
        for by_position in (0, 3):
            query[:, _head(config, by_position)] *= _QUIET
        if i < 2:  # the same token elsewhere: queries look like keys
            query[:, _head(config, 1)] = 0.15 * key[:, _head(config, 1)]
    out = encoder["layers_0"]["attention"]["out"]["kernel"]
    out[_head(config, 0)], out[_head(config, 3)] = before, two_before


def _wire_lookup(
    decoder: Any,
    config: ReaderConfig,
    codes: np.ndarray,
    before: np.ndarray,
    two_before: np.ndarray,
    match: float,
) -> None:
    """Wire the heads that find the token after the last two tokens in the source.

    Args:
      codes: value kernel of the encoder's first layer; its heads 0 and 3 give a token's codes
        along `before` and `two_before`.
    """
    table = decoder["relpos_bias"]["rel_embedding"]  # bucket i: i to the left
    table[:] = 0
    table[0, 0] = table[1, 1] = _SHARP  # the present token, and the one before it
    attention = decoder["layers_0"]["self_attention"]
    attention["query"]["kernel"][:, _head(config, 1)] *= _QUIET
    attention["value"]["kernel"][:, _head(config, 1)] = codes[:, _head(config, 3)]
    for i in range(config.num_decoder_layers):
        decoder[f"layers_{i}"]["self_attention"]["out"]["kernel"] *= _MURMUR
    attention["out"]["kernel"][_head(config, 1)] = two_before
    cross, head = decoder["layers_0"]["encoder_decoder_attention"], _head(config, 0)
    cross["query"]["kernel"][:, head] = match * (codes[:, head] + two_before.T)
    cross["key"]["kernel"][:, head] = before.T + two_before.T


def _wire_output(decoder: Any, config: ReaderConfig, copy: float) -> None:
    """Wire the output: the token that cross-attention finds instead of the present token."""
    for i in range(config.num_decoder_layers):
        cross = decoder[f"layers_{i}"]["encoder_decoder_attention"]
        decoder[f"layers_{i}"]["mlp"]["wo"]["kernel"] *= _MLP["decoder"]
        cross["out"]["kernel"][:] = cross["value"]["kernel"].T * (copy if i == 0 else copy / 2)
        cross["out"]["kernel"][config.head_dim :] *= _MURMUR  # all heads but the first
    last = decoder[f"layers_{config.num_decoder_layers - 1}"]["self_attention"]
    last["out"]["kernel"][_head(config, 0)] = -2 * last["value"]["kernel"][:, _head(config, 0)].T
    last["query"]["kernel"][:, _head(config, 0)] *= _QUIET
