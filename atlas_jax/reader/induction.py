"""A start from which a small reader learns to copy quickly: induction wired into fresh weights.

A randomly initialised reader of a few million parameters needs very many examples before
it copies anything from its source. The circuit that copies is known (previous-token head
and induction head, Elhage et al. 2021, Olsson et al. 2022), and initialising attention
with the structure that training would find is "mimetic" initialisation (Trockman and
Kolter, arXiv 2305.09828). Here:

* encoder, head 0 looks at the previous token, head 1 at other places of the same token,
  head 2 at the few tokens to the left; all by the relative-position table;
* the first encoder layer writes the previous token's value (head 0) along known directions;
* in the decoder's first layer, cross-attention head 0 finds places whose previous token is
  the present one, and all cross-attention writes the token that it finds into the output;
* the last decoder layer takes away the present token, which tied embeddings would repeat.

All weights stay trainable; it is a place to start from and no constraint.
"""

from typing import Any

import jax
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Params
from atlas_jax.reader.config import ReaderConfig

_QUIET = 0.1  # factor on query kernels of heads that go by position alone


def wire_induction(
    params: Params,
    config: ReaderConfig,
    seed: int = 0,
    match: float = 0.4,
    copy: float = 8.0,
    cancel: float = 2.0,
) -> Params:
    """Wire copying into freshly initialised parameters.

    Args:
      params: of a T5 with unscanned layers, as initialised; not changed.
      config: its sizes; at least three heads, embeddings tied to the output.
      seed: of the few directions drawn here.
      match: how sharply the induction head matches tokens.
      copy: how strongly cross-attention writes what it finds.
      cancel: how strongly the present token is taken away again.

    Returns:
      New parameters (numpy) of the same form.

    Raises:
      UserError: scanned layers, fewer than three heads, or an output matrix of its own.
    """
    for field, fits, expected in (
        ("scan_layers", not config.scan_layers, "False"),
        ("num_heads", config.num_heads >= 3, "3 or more"),
        ("logits_via_embedding", config.logits_via_embedding, "True"),
    ):
        if not fits:
            raise UserError(
                f"ReaderConfig.{field} = {getattr(config, field)}: the induction start of the "
                f"reader needs {expected}"
            )
    params = jax.tree.map(np.array, params)
    rng = np.random.default_rng(seed)
    written = rng.normal(0, config.head_dim**-0.5, (config.head_dim, config.emb_dim))
    _wire_encoder(params["encoder"], config, written.astype(np.float32))
    previous = params["encoder"]["layers_0"]["attention"]["value"]["kernel"]
    present = previous[:, _head(config, 0)] * match  # as a previous token's value, for queries
    _wire_decoder(params["decoder"], config, present, written.astype(np.float32), copy, cancel)
    return params


def _head(config: ReaderConfig, number: int) -> slice:
    """Where a head's columns stand among those of all heads."""
    return slice(number * config.head_dim, (number + 1) * config.head_dim)


def _wire_encoder(encoder: Any, config: ReaderConfig, written: np.ndarray) -> None:
    """Heads by position, and quieter blocks, so that tokens stay legible in the stream."""
    near = config.relpos_buckets // 4  # buckets of one distance each, to the left
    table = encoder["relpos_bias"]["rel_embedding"]  # [heads, buckets]; bucket i: i to the left
    table[:] = 0
    table[0, 1] = 8
    table[1, 0] = -6
    table[2, 1:near] = 3
    by_position, same_token = _head(config, 0), _head(config, 1)
    for i in range(config.num_encoder_layers):
        layer = encoder[f"layers_{i}"]
        query, key = (layer["attention"][name]["kernel"] for name in ("query", "key"))
        layer["attention"]["out"]["kernel"] *= 0.7
        layer["mlp"]["wo"]["kernel"] *= 0.5
        query[:, by_position] *= _QUIET
        if i < 2:  # the same token elsewhere: queries look like keys
            query[:, same_token] = 0.15 * key[:, same_token]
    encoder["layers_0"]["attention"]["out"]["kernel"][by_position] = written


def _wire_decoder(
    decoder: Any,
    config: ReaderConfig,
    present: np.ndarray,
    written: np.ndarray,
    copy: float,
    cancel: float,
) -> None:
    """Find what follows the present token in the source, and write it instead of that token."""
    table = decoder["relpos_bias"]["rel_embedding"]
    table[:] = 0
    table[0, 0] = 6  # head 0: the present token
    head = _head(config, 0)
    for i in range(config.num_decoder_layers):
        layer = decoder[f"layers_{i}"]
        cross = layer["encoder_decoder_attention"]
        layer["mlp"]["wo"]["kernel"] *= 0.5
        layer["self_attention"]["out"]["kernel"] *= 0.5
        if i == 0:  # "whose previous token am I?"
            cross["query"]["kernel"][:, head] = present
            cross["key"]["kernel"][:, head] = written.T * (config.head_dim / config.emb_dim)
        strength = copy if i == 0 else copy / 2
        cross["out"]["kernel"][:] = cross["value"]["kernel"].T * strength
    last = decoder[f"layers_{config.num_decoder_layers - 1}"]["self_attention"]
    last["out"]["kernel"][head] = -cancel * last["value"]["kernel"][:, head].T
    last["query"]["kernel"][:, head] *= _QUIET
