"""What an encoder is pretrained for, as losses: masked tokens, pairs, replaced tokens, spans.

Sources: google-research/bert and albert (run_pretraining.py), electra (run_pretraining.py,
arXiv 2003.10555), SpanBERT (arXiv 1907.10529), UniLM (arXiv 1905.03197), xlnet (data_utils.py,
arXiv 1906.08237).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from atlas_jax.core.errors import UserError
from atlas_jax.core.experts import EXPERT_FIELDS
from atlas_jax.core.types import Array
from atlas_jax.encoders.bert import BertConfig
from atlas_jax.encoders.model import EncoderModelConfig

# Objective -> the head that it needs.
OBJECTIVES = {
    "mlm": "mlm", "nsp": "sentence", "sop": "sentence", "electra": "discriminator",
    "sbo": "boundary", "unilm": "mlm", "xlnet": "plm",
}  # fmt: skip
PAIRS = ("nsp", "sop")
_NO_GENERATOR = ("roberta", "xlnet")


def token_loss(
    logits_bpv: Float[Array, "b p v"], labels_bp: Integer[Array, "b p"],
    weights_bp: Float[Array, "b p"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Cross-entropy and accuracy, each a mean over the predictions that count.

    Args:
      logits_bpv: of the masked places.
      labels_bp: tokens that were there.
      weights_bp: 1 for a prediction, 0 for what only fills the row.
    """
    log_bpv = jax.nn.log_softmax(logits_bpv, axis=-1)
    own_bp = jnp.take_along_axis(log_bpv, labels_bp[..., None].astype(jnp.int32), axis=-1)[..., 0]
    right_bp = (jnp.argmax(logits_bpv, axis=-1) == labels_bp).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights_bp), 1.0)
    return -jnp.sum(own_bp * weights_bp) / count, jnp.sum(right_bp * weights_bp) / count


def sentence_loss(
    logits_bc: Float[Array, "b c"], labels_b: Int[Array, " b"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy and accuracy of the sentence head, each a mean over the rows."""
    ones_b = jnp.ones((1, labels_b.shape[0]), jnp.float32)
    return token_loss(logits_bc[None], labels_b[None], ones_b)


def replaced_loss(
    logits_bl: Float[Array, "b l"], replaced_bl: Bool[Array, "b l"], real_bl: Bool[Array, "b l"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """ELECTRA's binary cross-entropy and its accuracy, each a mean over all real tokens."""
    positive_bl, real = replaced_bl.astype(jnp.float32), real_bl.astype(jnp.float32)
    loss_bl = jax.nn.softplus(logits_bl) - positive_bl * logits_bl
    right_bl = ((logits_bl > 0) == replaced_bl).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real), 1.0)
    return jnp.sum(loss_bl * real) / count, jnp.sum(right_bl * real) / count


def unified_masks(key: jax.Array, real_bl: Bool[Array, "b l"]) -> Bool[Array, "b l l"]:
    """UniLM's attention masks, one drawn for each row: True where [row, reader, key] may be read.

    A third of the rows reads all of itself, a sixth from the left alone, a sixth from the right
    alone. In the last third what is in front of a random place is a source, which reads itself, and
    the rest a target, which reads the source and its own past. (In the original a source and its
    target are two segments; here they are one text.)
    """
    kind_key, place_key = jax.random.split(key)
    b, length = real_bl.shape
    luck_b11 = jax.random.uniform(kind_key, (b, 1, 1))
    count_b11 = jnp.sum(real_bl, axis=1, dtype=jnp.float32)[:, None, None]
    source_b11 = 1 + jnp.floor(jax.random.uniform(place_key, (b, 1, 1)) * (count_b11 - 1))
    at_l = jnp.arange(length, dtype=jnp.float32)
    reader_1l1, key_11l = at_l[None, :, None], at_l[None, None, :]
    left_1ll, right_1ll = key_11l <= reader_1l1, key_11l >= reader_1l1
    to_target_bll = (key_11l < source_b11) | (left_1ll & (reader_1l1 >= source_b11))
    all_1ll = jnp.ones_like(left_1ll)
    mask_bll = jnp.where(luck_b11 < 2 / 3, right_1ll, to_target_bll)
    mask_bll = jnp.where(luck_b11 < 1 / 2, left_1ll, mask_bll)
    mask_bll = jnp.where(luck_b11 < 1 / 3, all_1ll, mask_bll)
    return mask_bll & real_bl[:, None, :]


def permutation_masks(
    key: jax.Array, real_bl: Bool[Array, "b l"], positions_bp: Int[Array, "b p"],
    weights_bp: Float[Array, "b p"],
) -> tuple[Bool[Array, "b l l"], Bool[Array, "b p l"]]:  # fmt: skip
    """XLNet's attention masks for one order of each row's tokens, drawn by the key.

    Token i may read j if j is no target or comes before i in the order. All tokens that are no
    target come before the targets. In the original the special tokens, too, take places among the
    targets; here they can always be read.

    Args:
      key: of the order.
      real_bl: False at padding, which is never read.
      positions_bp: of the targets.
      weights_bp: 1 for a target, 0 for what only fills the row.

    Returns:
      For the content stream [row, reader, key], in which each token also reads itself; and for the
      query stream of the targets [row, target, key], in which none does.
    """
    b, length = real_bl.shape
    drawn_bl = jax.random.uniform(key, (b, length))
    at_bp = jnp.where(weights_bp > 0, positions_bp, length)  # beyond the row: dropped
    rows_b1 = jnp.arange(b)[:, None]
    target_bl = jnp.zeros((b, length), bool).at[rows_b1, at_bp].set(True, mode="drop")
    place_bl = jnp.where(target_bl, drawn_bl, -1.0)
    seen_bll = ~target_bl[:, None, :] | (place_bl[:, None, :] < place_bl[:, :, None])
    seen_bll = seen_bll & real_bl[:, None, :]
    query_bpl = jnp.take_along_axis(seen_bll, positions_bp[..., None], axis=1)
    return seen_bll | jnp.eye(length, dtype=bool)[None], query_bpl


def beside_spans(
    chosen_bl: Bool[Array, "b l"],
) -> tuple[Int[Array, "b l"], Int[Array, "b l"]]:
    """The last place before and the first place after each token that was not chosen for masking.

    Spans that touch are one. A row begins and ends with a token that is never chosen.
    """
    length = chosen_bl.shape[1]
    at_1l = jnp.arange(length, dtype=jnp.int32)[None]
    left_bl = jax.lax.cummax(jnp.where(chosen_bl, 0, at_1l), axis=1)
    right_bl = jax.lax.cummin(jnp.where(chosen_bl, length - 1, at_1l), axis=1, reverse=True)
    return left_bl, right_bl


def sampled(key: jax.Array, logits_bpv: Float[Array, "b p v"]) -> Int[Array, "b p"]:
    """One token of each place's softmax (by Gumbel noise); no gradient goes through it."""
    sample_bp = jax.random.categorical(key, jax.lax.stop_gradient(logits_bpv), axis=-1)
    return sample_bp.astype(jnp.int32)


def with_tokens(
    tokens_bl: Integer[Array, "b l"], positions_bp: Int[Array, "b p"],
    weights_bp: Float[Array, "b p"], new_bp: Integer[Array, "b p"],
) -> Integer[Array, "b l"]:  # fmt: skip
    """The rows with other tokens at the positions whose weight is not 0."""
    length = tokens_bl.shape[1]
    at_bp = jnp.where(weights_bp > 0, positions_bp, length)  # beyond the row: dropped
    rows_b1 = jnp.arange(tokens_bl.shape[0])[:, None]
    return tokens_bl.at[rows_b1, at_bp].set(new_bp.astype(tokens_bl.dtype), mode="drop")


def with_objectives(config: EncoderModelConfig, objectives: Sequence[str]) -> EncoderModelConfig:
    """An encoder's config with every head that the objectives need; two classes for NSP and SOP.

    Raises:
      UserError: 'xlnet' with another encoder than an XLNet.
    """
    if "xlnet" in objectives and config.encoder != "xlnet":
        raise UserError(
            f"EncoderModelConfig.encoder = {config.encoder!r}: expected 'xlnet' with the objective "
            "'xlnet', whose targets are predicted by a second stream"
        )
    heads = tuple(OBJECTIVES[one] for one in objectives)
    classes = 2 if "sentence" in heads else config.num_classes
    names = tuple(dict.fromkeys((*config.heads, *heads)))
    return dataclasses.replace(config, heads=names, num_classes=classes)


def generator_config(config: EncoderModelConfig, share: float) -> EncoderModelConfig:
    """ELECTRA's generator for a discriminator: narrower, equally deep, without experts.

    Its embedding tables and their norm are the discriminator's, so they have the same width.

    Args:
      config: of the discriminator.
      share: of its width, its heads and the width of its feed-forward block.

    Raises:
      UserError: this kind of encoder cannot share its tables with a narrower one.
    """
    if config.encoder in _NO_GENERATOR:
        raise UserError(
            f"EncoderModelConfig.encoder = {config.encoder!r} has no narrower twin that could "
            "share its tables, which the objective 'electra' needs; use 'electra', 'bert' or "
            "'albert'"
        )
    tower = config.tower
    assert isinstance(tower, BertConfig)
    options = {k: v for k, v in config.encoder_options.items() if k not in EXPERT_FIELDS}
    heads = max(1, round(config.num_heads * share))
    width = max(1, round(config.hidden_dim * share / heads)) * heads
    return dataclasses.replace(
        config,
        encoder="albert" if config.encoder == "albert" else "electra",
        encoder_options={**options, "factor_dim": tower.table_dim},
        hidden_dim=width,
        num_heads=heads,
        mlp_dim=max(1, round(config.mlp_dim * share)),
        heads=("mlm",),
    )


@dataclasses.dataclass(frozen=True)
class TokenTables:
    """What a vocabulary says of each of its ids.

    Attributes:
      starts_v: True where a piece begins a word.
      special_v: True for tokens that no text contains.
      mask_id: the mask token.
    """

    starts_v: np.ndarray
    special_v: np.ndarray
    mask_id: int
