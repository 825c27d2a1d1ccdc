"""Heads on an encoder's states: masked or permuted tokens, sentences, replaced tokens, spans."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from atlas_jax.core.layers import Embed
from atlas_jax.core.types import Array
from atlas_jax.encoders.bert import ACTIVATIONS, BertConfig, dense, layer_norm


class MlmHead(nn.Module):
    """Logits over the vocabulary: `LN(activation(h A + a))` times the token table, plus a bias.

    A is as wide as the table. The table belongs to the encoder, not to the head.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self, states: Float[Array, "*rows d"], table_ve: Float[Array, "v e"]
    ) -> Float[Array, "*rows v"]:
        """States [..., d] and the encoder's token table -> float32 logits [..., v]."""
        cfg = self.config
        x = dense(cfg, cfg.table_dim, ("embed", "unsharded"), "transform")(states)
        x = layer_norm(cfg, "layer_norm")(ACTIVATIONS[cfg.activation](x))
        return _token_logits(self, x, table_ve)


class PermutationHead(nn.Module):
    """XLNet's head: states times the token table, plus a bias; the table is the encoder's."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, states: Float[Array, "*rows d"], table_ve: Float[Array, "v d"]
    ) -> Float[Array, "*rows v"]:
        """States [..., d] and the encoder's token table -> float32 logits [..., v]."""
        return _token_logits(self, states, table_ve)


def _token_logits(
    head: "MlmHead | PermutationHead | BoundaryHead", x: jax.Array, table_ve: jax.Array
) -> jax.Array:
    """States [..., e] times the token table, plus the head's parameter `bias`."""
    bias_v: Any = head.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros, ("unsharded",)),
        (head.config.vocab_size,),
        jnp.float32,
    )
    logits = _logits(x, table_ve.T)
    return logits + jnp.broadcast_to(bias_v, logits.shape)


class Pooler(nn.Module):
    """`tanh(h_0 P + p)` of the first token's state h_0; input of the sentence heads."""

    config: BertConfig

    @nn.compact
    def __call__(self, states_bld: Float[Array, "b l d"]) -> Float[Array, "b d"]:
        """States [b, l, d] -> [b, d]."""
        kernel_axes = ("unsharded", "embed")
        return jnp.tanh(
            dense(self.config, self.config.hidden_dim, kernel_axes, "dense")(states_bld[:, 0])
        )


class SentenceHead(nn.Module):
    """The pooler and a classifier on it, for NSP, SOP or the classes of a task.

    Attributes:
        dropout_rate: of the pooled state, whatever the encoder's rate is. For example, ALBERT
            is fine-tuned with 0.1 here and no dropout in its encoder.
    """

    config: BertConfig
    num_classes: int = 2
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, states_bld: Float[Array, "b l d"], deterministic: bool = True
    ) -> Float[Array, "b {self.num_classes}"]:
        """States [b, l, d] -> float32 logits [b, classes]."""
        pooled_bd = Pooler(self.config, name="pooler")(states_bld)
        pooled_bd = nn.Dropout(self.dropout_rate)(pooled_bd, deterministic=deterministic)
        axes = ("embed", "unsharded")
        return dense(self.config, self.num_classes, axes, "classifier")(pooled_bd).astype(
            jnp.float32
        )


class DiscriminatorHead(nn.Module):
    """ELECTRA's head: for each token, the logit that it was replaced."""

    config: BertConfig

    @nn.compact
    def __call__(self, states_bld: Float[Array, "b l d"]) -> Float[Array, "b l"]:
        """States [b, l, d] -> float32 logits [b, l]."""
        cfg = self.config
        x_bld = dense(cfg, cfg.hidden_dim, ("unsharded", "embed"), "transform")(states_bld)
        x_bld = ACTIVATIONS[cfg.activation](x_bld)
        logits_bl1 = dense(cfg, 1, ("embed", "unsharded"), "classifier")(x_bld)
        return logits_bl1[..., 0].astype(jnp.float32)


BOUNDARY_PLACES, BOUNDARY_WIDTH = 20, 200


class BoundaryHead(nn.Module):
    """SpanBERT's head: a masked span's tokens from the states in front of it and behind it.

    `LN(g(LN(g([h_l; h_r; p_i] A + a)) B + b))` times the token table, plus a bias, with g the
    encoder's activation. p_i, of width 200, is that of the i-th token of the span, from 0 to 19
    (SpanBERT: fairseq/models/pair_bert.py; arXiv 1907.10529, section 3.2).
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        left: Float[Array, "*rows d"],
        right: Float[Array, "*rows d"],
        places: Int[Array, "*rows"],
        table_ve: Float[Array, "v e"],
    ) -> Float[Array, "*rows v"]:
        """States beside the span and the token's place in it -> float32 logits [..., v]."""
        cfg = self.config
        positions = Embed(
            BOUNDARY_PLACES, BOUNDARY_WIDTH, ("unsharded", "unsharded"), left.dtype,
            nn.initializers.normal(0.02), name="position_embeddings",
        )(places)  # fmt: skip
        x = jnp.concatenate([left, right, positions], axis=-1)
        for number, width in enumerate((cfg.hidden_dim, cfg.table_dim)):
            x = dense(cfg, width, ("unsharded", "unsharded"), f"transform_{number}")(x)
            x = layer_norm(cfg, f"layer_norm_{number}")(ACTIVATIONS[cfg.activation](x))
        return _token_logits(self, x, table_ve)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "mlm": MlmHead,
    "sentence": SentenceHead,
    "discriminator": DiscriminatorHead,
    "boundary": BoundaryHead,
    "plm": PermutationHead,
}


def _logits(x: jax.Array, table: jax.Array) -> jax.Array:
    """[..., e] x [e, v], summed in float32."""
    return jnp.matmul(x, table.astype(x.dtype), preferred_element_type=jnp.float32)
