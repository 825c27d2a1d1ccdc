"""XLNet (arXiv 1906.08237): relative positions, and two streams for permutation language modelling.

A layer is a BERT layer whose attention scores a key j for a reader i by

    ((q_i + u) . k_j + (q_i + v) . R_{i - j} + (q_i + w) . s_ij) / sqrt(channels),

with u, v, w learnt for each head, R the projection of a sinusoid of the distance, and s_ij one of
two vectors: of the same segment, or of two segments (modeling.py: rel_attn_core). Query, key,
value, output and R have no bias. There is no table of positions.

Two streams go through the same layers. The content stream reads tokens. The query stream begins as
one learnt vector at each target and reads the content stream alone, so that it knows where it is
but not which token is there. Here its states stand behind those of the content stream in one array,
and only the latter are keys.

What the original has beside this and we leave out: memory of earlier segments, which texts of one
row do not need; the classifier token at the end of a text (here it is the first, as in BERT); and
dropout between the two products of the feed-forward block (no encoder here has it).
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from atlas_jax.core import adapters, bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import Dense, Embed, softmax
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Array
from atlas_jax.encoders.bert import (
    INITIALIZERS,
    BertConfig,
    BertEncoder,
    BertLayer,
    check_length,
    layer_norm,
    rematerialised,
)
from atlas_jax.encoders.visible import attention_bias, within

_WAVES = 10_000.0  # longest wave of the sinusoids, in units of 2 pi


@dataclasses.dataclass(frozen=True)
class XlnetConfig(BertConfig):
    """An XLNet; the sizes are those of XLNet base (arXiv 1906.08237, appendix A.4).

    `max_positions` only bounds the length of a text, and `type_vocab_size` the number of segments:
    no parameter depends on either.
    """

    NEUTRAL: ClassVar[frozenset[str]] = BertConfig.NEUTRAL | {"max_positions", "type_vocab_size"}
    TOLD_BY_PARAMETERS: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "num_layers", "mlp_dim"}
    )

    NO_EXPERTS: ClassVar[str] = "the layers of an XLNet are plain"

    vocab_size: bounds.Vocabulary = 32000

    def __post_init__(self) -> None:
        """Raise `UserError`, naming class and field, when a field is out of range."""
        super().__post_init__()
        if self.scan_layers:
            raise UserError(
                "XlnetConfig.scan_layers = True: must be False; an XLNet's layers are not scanned"
            )
        if self.attention != "xla":
            raise UserError(
                f"XlnetConfig.attention = {self.attention!r}: must be 'xla'; an XLNet's scores "
                "have terms of their own for distances and segments"
            )
        if self.hidden_dim % 2:
            raise UserError(
                f"XlnetConfig.hidden_dim = {self.hidden_dim}: must be even, for a sine and a "
                "cosine of each wave"
            )

    def uses(self, path: str) -> int:
        """None for the product with distances, which are few and the same for all texts."""
        return 0 if path.endswith("attention/relative/kernel") else 1


class Relations(NamedTuple):
    """What a layer knows of readers and keys beside their states; m readers, l keys.

    Attributes:
      bias_b1ml: float32, 0 where a key may be read and very small elsewhere.
      waves_rd: sinusoids of the distances l, l - 1, ..., 1 - l from key to reader; r is 2 l.
      positions_bp: of the readers behind the first l, which stand at 0, 1, 2...; None = no others.
      apart_bml: True for a key of another segment than the reader's; None = all are of one.
    """

    bias_b1ml: Float[Array, "b 1 #m l"]
    waves_rd: Float[Array, "r d"]
    positions_bp: Int[Array, "b p"] | None = None
    apart_bml: Bool[Array, "b m l"] | None = None


def waves(length: int, width: int) -> np.ndarray:
    """Sines, then cosines, of the distances length, ..., 1 - length; float32 [2 length, width]."""
    distance_r = np.arange(length, -length, -1.0)
    slowness_w = _WAVES ** (np.arange(0, width, 2.0) / width)
    angle_rw = distance_r[:, None] / slowness_w[None]
    return np.concatenate([np.sin(angle_rw), np.cos(angle_rw)], axis=1).astype(np.float32)


class XlnetAttention(nn.Module):
    """Attention with relative positions and segments; logits and softmax in float32."""

    config: XlnetConfig

    @nn.compact
    def __call__(
        self, x_bmd: Float[Array, "b m d"], relations: Relations, deterministic: bool
    ) -> Float[Array, "b m d"]:
        """States of all readers, the first l of which are the keys -> [b, m, d]."""
        cfg = self.config
        b, readers, width = x_bmd.shape
        length, channels = relations.bias_b1ml.shape[-1], width // cfg.num_heads
        keys_bld = x_bmd[:, :length]

        def heads(name: str, x: jax.Array) -> jax.Array:
            y = self._product(name, ("embed", "joined_kv"))(x)
            y = y.reshape(-1, x.shape[-2], cfg.num_heads, channels).transpose(0, 2, 1, 3)
            return constrain(y, "batch" if x.ndim == 3 else None, "heads", "length", "kv")

        def scores(letters: str, bias: str, others: jax.Array) -> jax.Array:
            query = query_bhmc + self._per_head(bias, (cfg.num_heads, channels))[None, :, None]
            return jnp.einsum(letters, query, others, preferred_element_type=jnp.float32)

        query_bhmc = heads("query", x_bmd)
        key_bhlc = adapters.behind_prefix(self, "key", heads("key", keys_bld))
        value_bhlc = adapters.behind_prefix(self, "value", heads("value", keys_bld))
        distance_hrc = heads("relative", relations.waves_rd)[0]
        by_distance = scores("bhmc,hrc->bhmr", "position_bias", distance_hrc)
        placed_bhml = at_distances(by_distance, length, relations.positions_bp)
        if relations.apart_bml is not None:
            segment_shc = self._per_head("segment_embedding", (2, cfg.num_heads, channels))
            by_segment = scores("bhmc,shc->bhms", "segment_bias", segment_shc)
            own, other = by_segment[..., :1], by_segment[..., 1:]
            placed_bhml = placed_bhml + jnp.where(relations.apart_bml[:, None], other, own)
        elif self.is_initializing():
            self._per_head("segment_embedding", (2, cfg.num_heads, channels))
            self._per_head("segment_bias", (cfg.num_heads, channels))
        scale = 1.0 / math.sqrt(channels)
        placed_bhml = adapters.beside_prefix(self, placed_bhml * scale + relations.bias_b1ml)
        logits_bhml = scores("bhmc,bhlc->bhml", "content_bias", key_bhlc) * scale + placed_bhml
        weights_bhml = softmax(logits_bhml).astype(x_bmd.dtype)
        weights_bhml = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            weights_bhml, deterministic=deterministic
        )
        mixed_bhmc = jnp.einsum("bhml,bhlc->bhmc", weights_bhml, value_bhlc)
        mixed_bmd = mixed_bhmc.transpose(0, 2, 1, 3).reshape(b, readers, width)
        return self._product("output", ("joined_kv", "embed"))(mixed_bmd)

    def _product(self, name: str, axes: tuple[str, str]) -> Dense:
        cfg = self.config
        init = INITIALIZERS[cfg.initializer]
        dtype = jnp.dtype(cfg.dtype)
        return Dense(cfg.hidden_dim, axes, dtype=dtype, kernel_init=init, name=name)

    def _per_head(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """A parameter [..., h, c], in the config's dtype."""
        axes = (*("unsharded",) * (len(shape) - 2), "heads", "kv")
        init = nn.with_logical_partitioning(INITIALIZERS[self.config.initializer], axes)
        value: Any = self.param(name, init, shape, jnp.float32)
        return jnp.asarray(value, jnp.dtype(self.config.dtype))


def at_distances(
    scores_bhmr: Float[Array, "b h m r"], length: int, positions_bp: Int[Array, "b p"] | None
) -> Float[Array, "b h m l"]:
    """Turn scores by distance into scores by key, for each reader.

    Args:
      scores_bhmr: entry t is of the key t - length places behind the reader; r is 2 length.
      length: of the keys, and the number of the first readers, which stand at 0, 1, 2...
      positions_bp: of the readers behind them.
    """
    b, h, _, r = scores_bhmr.shape
    # Reader i needs the entries from length - i on. Seen as rows of `length` entries, all but the
    # first row are those entries one after the other, in rows of r - 1 (the original's shift).
    rows = scores_bhmr[:, :, :length].reshape(b, h, r, length)[:, :, 1:]
    placed = rows.reshape(b, h, length, r - 1)[..., :length]
    if positions_bp is None:
        return placed
    at_bpl = length - positions_bp[..., None] + jnp.arange(length, dtype=jnp.int32)[None, None]
    behind = jnp.take_along_axis(scores_bhmr[:, :, length:], at_bpl[:, None], axis=-1)
    return jnp.concatenate([placed, behind], axis=2)


class XlnetLayer(BertLayer):
    """Attention and feed-forward, each followed by residual and layer norm."""

    config: XlnetConfig

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x_bmd: Float[Array, "b m d"], relations: Relations, deterministic: bool
    ) -> Float[Array, "b m d"]:
        """States [b, m, d] -> [b, m, d]."""
        cfg = self.config
        y_bmd = XlnetAttention(cfg, name="attention")(x_bmd, relations, deterministic)
        y_bmd = nn.Dropout(cfg.dropout_rate)(y_bmd, deterministic=deterministic)
        x_bmd = layer_norm(cfg, "attention_layer_norm")(x_bmd + y_bmd)
        x_bmd = constrain(x_bmd, "batch", "length", "embed")
        return self._feed_forward(x_bmd, deterministic)


class XlnetEmbeddings(nn.Module):
    """The token table, without norm, and the vector that the query stream begins as."""

    config: XlnetConfig

    def setup(self) -> None:
        """Make the table and the vector."""
        cfg = self.config
        init = INITIALIZERS[cfg.initializer]
        self.word_embeddings = Embed(
            cfg.vocab_size, cfg.hidden_dim, ("unsharded", "embed"), jnp.dtype(cfg.dtype), init
        )
        boxed = nn.with_logical_partitioning(init, ("embed",))
        self.target: Any = self.param("target", boxed, (cfg.hidden_dim,), jnp.float32)


class XlnetEncoder(BertEncoder):
    """Tokens to states; `predicted` gives the query stream's states of targets."""

    config: XlnetConfig

    def setup(self) -> None:
        """Make the embeddings and the layers."""
        cfg = self.config
        self.embeddings = XlnetEmbeddings(cfg)  # type: ignore[assignment]
        layer = rematerialised(XlnetLayer, cfg)
        self.layers = [layer(cfg) for _ in range(cfg.num_layers)]
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def predicted(
        self,
        tokens_bl: Integer[Array, "b l"],
        positions_bp: Int[Array, "b p"],
        content_bll: Bool[Array, "b l l"],
        query_bpl: Bool[Array, "b p l"],
        deterministic: bool = True,
        types_bl: Integer[Array, "b l"] | None = None,
    ) -> Float[Array, "b p d"]:
        """States from which the tokens at `positions_bp` are to be predicted.

        Args:
          tokens_bl: whole texts; what is predicted is not replaced.
          positions_bp: of the targets.
          content_bll: True where a token, as [row, reader, key], may read another.
          query_bpl: True where a target may read a token; never itself.
          deterministic: False applies dropout.
          types_bl: segment of each token; None = all of one.
        """
        x_bld = self._embedded(tokens_bl, None)
        b, p = positions_bp.shape
        query_bpd = jnp.broadcast_to(self.embeddings.target, (b, p, x_bld.shape[-1]))
        x_bmd = jnp.concatenate([x_bld, query_bpd.astype(x_bld.dtype)], axis=1)
        mask_bml = jnp.concatenate([content_bll, query_bpl], axis=1)
        states = self._layers(x_bmd, mask_bml, deterministic, types_bl, positions_bp)
        return states[-1][:, tokens_bl.shape[1] :]

    def _encode(
        self,
        tokens_bl: jax.Array,
        deterministic: bool,
        mask: jax.Array | None,
        types_bl: jax.Array | None,
        embedded_ble: jax.Array | None,
        segments_bl: jax.Array | None,
        every: bool = False,
    ) -> list[jax.Array]:
        """The content stream's states of the last layer, or with `every` those of all layers."""
        x_bld = self._embedded(tokens_bl, embedded_ble)
        mask = tokens_bl != PAD_ID if mask is None else mask
        mask = mask if segments_bl is None else within(mask, segments_bl)
        states = self._layers(x_bld, mask, deterministic, types_bl)
        return states if every else states[-1:]

    def _embedded(self, tokens_bl: jax.Array, embedded_ble: jax.Array | None) -> jax.Array:
        check_length(self.config, tokens_bl.shape[1], "the encoder")
        return self.embed_tokens(tokens_bl) if embedded_ble is None else embedded_ble

    def _layers(
        self,
        x_bmd: jax.Array,
        mask: jax.Array,
        deterministic: bool,
        types_bl: jax.Array | None,
        positions_bp: jax.Array | None = None,
    ) -> list[jax.Array]:
        """States before the first layer and after each, with the last dropout behind the last."""
        length = mask.shape[-1]
        waves_rd = jnp.asarray(waves(length, self.config.hidden_dim), x_bmd.dtype)
        waves_rd = self.dropout(waves_rd, deterministic=deterministic)
        apart = None
        if types_bl is not None:
            own = types_bl
            if positions_bp is not None:
                targets = jnp.take_along_axis(types_bl, positions_bp, axis=1)
                own = jnp.concatenate([types_bl, targets], axis=1)
            apart = own[:, :, None] != types_bl[:, None, :]
        relations = Relations(attention_bias(mask), waves_rd, positions_bp, apart)
        x_bmd = self.dropout(x_bmd, deterministic=deterministic)
        states = [constrain(x_bmd, "batch", "length", "embed")]
        for layer in self.layers:
            states.append(layer(states[-1], relations, deterministic))
        states[-1] = self.dropout(states[-1], deterministic=deterministic)
        return states
