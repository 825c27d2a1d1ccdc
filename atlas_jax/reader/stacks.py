"""T5's layers, and the encoder and decoder that they make up."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling
from jaxtyping import Bool, Float, Int, Shaped

from atlas_jax.core import adapters
from atlas_jax.core.experts import SwitchMlp
from atlas_jax.core.fused import Seen
from atlas_jax.core.layers import REMAT_POLICIES, Dense, RMSNorm
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import Array
from atlas_jax.reader.attention import (
    Attention,
    FusedRead,
    KeyValue,
    RelativePositionBias,
    mask_bias,
)
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.pointer import (
    Pointed,
    Pointer,
    PointerState,
)

_ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "linear": lambda x: x}  # nn.gelu is the tanh form


class SourceMask(NamedTuple):
    """Which source positions a decoder position may read.

    Attributes:
      bias_n1qs: float32, added to the cross-attention logits; q is r * t or 1.
      visible_nq1: False where nothing is visible; cross-attention then gives zeros.
    """

    bias_n1qs: Float[Array, "n 1 q s"]
    visible_nq1: Bool[Array, "n q 1"]


@flax.struct.dataclass
class DecodingState:
    """What cached decoding carries from step to step; n = b * r targets.

    Attributes:
      index: int32, position that the next token takes: a scalar, or [n] where each target has
        come to a position of its own.
      self_caches: keys and values of the targets so far, each [b * r, h, t, c]; one pair per
        layer, or one pair with a leading axis ``layers`` when layers are scanned.
      source_caches: keys and values of the source, [b, h, s, c], in the same structure.
      source_mask: visible source positions.
      position_bias_1htt: self-attention bias of all positions.
      source: the tokens that may be copied; None without a pointer.
      pointer: the pointer's last position (after `T5.steps` each of the last w, on an axis behind
        n); None without a pointer.
      source_mask_bs: bool, visible source positions.
    """

    index: Array
    self_caches: Any
    source_caches: Any
    source_mask: SourceMask
    position_bias_1htt: Array
    source: Pointed | None = None
    pointer: PointerState | None = None
    source_mask_bs: Array | None = None

    def keep(self, count: int | Int[Array, " n"]) -> "DecodingState":
        """The state after the first ``count`` tokens that `T5.steps` was fed with.

        What the caches hold behind them is not seen, and is overwritten by the tokens that come
        there.

        Args:
          count: from 0 to w. Of a target that keeps none, the pointer means nothing.
        """

        def last(x: jax.Array) -> jax.Array:
            if isinstance(count, int):
                return x[:, count - 1]
            at = jnp.maximum(count - 1, 0).reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.take_along_axis(x, at, axis=1, mode="clip")[:, 0]

        pointer = jax.tree.map(last, self.pointer)
        return dataclasses.replace(self, index=self.index + count, pointer=pointer)


def dropout(config: ReaderConfig) -> nn.Dropout:
    """Dropout with one mask for all positions of a sequence, as in T5X."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


def norm(config: ReaderConfig) -> RMSNorm:
    """T5's layer norm in the dtype of the config."""
    return RMSNorm(dtype=config.compute_dtype)


class Mlp(nn.Module):
    """Feed-forward block: ``wi`` (relu) or ``wi_0``, ``wi_1`` (gated), then ``wo``."""

    config: ReaderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n l d"], deterministic: bool) -> Float[Array, "n l d"]:
        """[n, l, d] -> [n, l, d]."""
        cfg = self.config
        hidden: Any = 1.0
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            wi = Dense(cfg.mlp_dim, ("embed", "mlp"), dtype=cfg.compute_dtype, name=name)
            hidden = hidden * _ACTIVATIONS[activation](wi(x))
        hidden = dropout(cfg)(hidden, deterministic=deterministic)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense(cfg.emb_dim, ("mlp", "embed"), dtype=cfg.compute_dtype, name="wo")(hidden)


def feed_forward(config: ReaderConfig, switch: bool) -> Mlp | SwitchMlp:
    """A layer's MLP, of experts in a Switch layer."""
    if not switch:
        return Mlp(config)
    return SwitchMlp(
        config,
        config.mlp_dim,
        tuple(_ACTIVATIONS[name] for name in config.mlp_activations),
        config.compute_dtype,
        variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,)),
        dropout_rate=config.dropout_rate,
    )


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each after a norm and with a residual connection.

    Attributes:
      switch: whether the MLP has experts.
    """

    config: ReaderConfig
    switch: bool = False

    def setup(self) -> None:
        """Create the sub-layers."""
        self.pre_attention_layer_norm = norm(self.config)
        self.attention = Attention(self.config)
        self.pre_mlp_layer_norm = norm(self.config)
        self.mlp = feed_forward(self.config, self.switch)
        self.dropout = dropout(self.config)

    def __call__(
        self,
        x_nld: Float[Array, "n l d"],
        biases: tuple[Float[Array, "#n #h #l l"], ...] | FusedRead,
        deterministic: bool,
    ) -> tuple[Float[Array, "n l d"], None]:
        """[n, l, d] -> [n, l, d]; a scan needs an output for each layer, which is None."""
        x = constrain(x_nld, "batch", "length", "embed")
        y = self.pre_attention_layer_norm(x)
        if isinstance(biases, FusedRead):
            y, _ = self.attention.fused(y, y, biases, deterministic)
        else:
            y, _ = self.attention(y, self.attention.keys_values(y), biases, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic), None


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each after a norm and with a residual connection.

    Attributes:
      switch: whether the MLP has experts.
    """

    config: ReaderConfig
    switch: bool = False

    def setup(self) -> None:
        """Create the sub-layers."""
        self.pre_self_attention_layer_norm = norm(self.config)
        self.self_attention = Attention(self.config)
        self.pre_cross_attention_layer_norm = norm(self.config)
        self.encoder_decoder_attention = Attention(self.config, reads="source")
        self.pre_mlp_layer_norm = norm(self.config)
        self.mlp = feed_forward(self.config, self.switch)
        self.dropout = dropout(self.config)

    def __call__(
        self,
        x_ntd: Float[Array, "n t d"],
        enc_bsd: Float[Array, "b s d"],
        biases: tuple[Float[Array, "#n #h #t t"], ...],
        source_mask: SourceMask | FusedRead,
        weight_bt: Shaped[Array, "b t"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "n t d"], Float[Array, "b s"] | None]:
        """Decode whole targets; n = b * r.

        Returns:
          [n, t, d], and with ``weight_bt`` the attention mass of the source positions, [b, s].
        """
        x = constrain(x_ntd, "batch", "length", "embed")
        y = self.pre_self_attention_layer_norm(x)
        y, _ = self.self_attention(y, self.self_attention.keys_values(y), biases, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        source: KeyValue | jax.Array = enc_bsd
        if isinstance(source_mask, SourceMask):
            source = self.encoder_decoder_attention.keys_values(enc_bsd)
        x, mass = self._read_source(x, source, source_mask, deterministic, weight_bt)
        return self._feed_forward(x, deterministic), mass

    def source_cache(self, _: None, enc_bsd: Float[Array, "b s d"]) -> tuple[None, KeyValue]:
        """Keys and values of the source for ``step``."""
        return None, self.encoder_decoder_attention.keys_values(enc_bsd)

    def steps(
        self,
        x_nwd: Float[Array, "n w d"],
        cache: KeyValue,
        source: KeyValue,
        biases: tuple[Float[Array, "#n #h w _"], ...],
        source_mask: SourceMask,
        index: Int[Array, "*n"],
    ) -> tuple[Float[Array, "n w d"], KeyValue]:
        """Decode the next w positions, which enter the cache from ``index`` on."""
        y = self.pre_self_attention_layer_norm(x_nwd)
        now = self.self_attention.keys_values(y)
        cache = KeyValue(*(_enter(old, new, index) for old, new in zip(cache, now, strict=True)))
        y, _ = self.self_attention(y, cache, biases, True)
        x, _ = self._read_source(x_nwd + y, source, source_mask, True)
        return self._feed_forward(x, True), cache

    def _read_source(
        self,
        x_ntd: jax.Array,
        source: Any,
        mask: SourceMask | FusedRead,
        deterministic: bool,
        weight_bt: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Read a source: keys and values, or for fused attention its states [b, s, d]."""
        n, t, d = x_ntd.shape
        y = self.pre_cross_attention_layer_norm(x_ntd)
        b = jax.tree.leaves(source)[0].shape[0]
        y = y.reshape(b, n // b * t, d)  # variants of one source side by side
        attention, mass = self.encoder_decoder_attention, None
        if isinstance(mask, FusedRead):
            y, mass = attention.fused(y, source, mask, deterministic, weight_bt)
        else:
            y, probs = attention(y, source, (mask.bias_n1qs,), deterministic)
            if not adapters.prefix_length(attention):  # which can always be read
                y = jnp.where(mask.visible_nq1, y, 0)
            if weight_bt is not None:
                mass = _attention_mass(probs, source.value, weight_bt)
        y = y.reshape(n, t, d)
        return x_ntd + self.dropout(y, deterministic=deterministic), mass

    def _feed_forward(self, x: jax.Array, deterministic: bool) -> jax.Array:
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic)


def _enter(cache_nhtc: jax.Array, new_nhwc: jax.Array, index: jax.Array) -> jax.Array:
    """Write w positions of each row from its index on."""
    if not index.ndim:
        return jax.lax.dynamic_update_slice_in_dim(cache_nhtc, new_nhwc, index, axis=2)
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)  # of one row
    return jax.vmap(update)(cache_nhtc, new_nhwc, index)


def _attention_mass(probs_bhts: Any, value_bhsc: Any, weight_bt: jax.Array) -> jax.Array:
    """Mean over heads of attention x ||value||, summed over weighted targets, [b, s] float32."""
    norm_bhs = jnp.linalg.norm(value_bhsc.astype(jnp.float32), axis=-1)
    total_bhs = jnp.einsum("bhts,bt->bhs", probs_bhts, weight_bt.astype(jnp.float32))
    return jnp.mean(total_bhs * norm_bhs, axis=1)


def _make_layers(layer_class: Any, config: ReaderConfig, count: int, methods: Any) -> Any:
    """Make a list of ``count`` layers, or with ``config.scan_layers`` one layer to be scanned.

    Args:
      layer_class: the module of one layer.
      config: sizes, and whether to scan and rematerialise.
      count: the number of layers.
      methods: the methods that a scan calls for each layer. Name -> two numbers that count their
        arguments after the first one, which is the scan's carry: first the arguments that have
        an entry for each layer, then those that are the same for all layers.
    """
    if config.remat_policy != "none":
        # Position of the last argument, `deterministic`, not counting self.
        deterministic = sum(methods["__call__"])
        layer_class = nn.remat(
            layer_class,
            policy=REMAT_POLICIES[config.remat_policy],
            prevent_cse=not config.scan_layers,
            static_argnums=(deterministic + 1,),
        )
    if not config.scan_layers:
        return [layer_class(config, config.is_switch(i)) for i in range(count)]
    lifted = {
        name: {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True},
            "in_axes": (0,) * per_layer + (nn.broadcast,) * shared,
            "length": count,
            "metadata_params": {nn.PARTITION_NAME: "layers"},
        }
        for name, (per_layer, shared) in methods.items()
    }
    return nn.scan(layer_class, methods=lifted)(config)


class Encoder(nn.Module):
    """The encoder stack."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create layers, position table and final norm."""
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.layers = _make_layers(EncoderLayer, cfg, cfg.num_encoder_layers, {"__call__": (0, 2)})
        self.encoder_norm = norm(cfg)
        self.dropout = dropout(cfg)

    def __call__(
        self,
        x_nld: Float[Array, "n l d"],
        seen: Bool[Array, "n _ l"] | Seen,
        deterministic: bool,
    ) -> Float[Array, "n l d"]:
        """Embedded tokens [n, l, d] -> normed states [n, l, d].

        Args:
          seen: which tokens each token attends to: a mask [n, q, l], where q is l, or 1 if all
            attend to the same; or for fused attention their segments.
        """
        length = x_nld.shape[1]
        biases: Any
        if isinstance(seen, Seen):
            biases = FusedRead(seen, self.relpos_bias.by_distance(length, length))
        else:
            biases = (self.relpos_bias(length, length), mask_bias(seen)[:, None])
        x = self.dropout(x_nld, deterministic=deterministic)
        if self.config.scan_layers:
            x, _ = self.layers(x, biases, deterministic)
        else:
            for layer in self.layers:
                x, _ = layer(x, biases, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder stack and its vocabulary head."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create layers, position table, final norm and, unless tied, the head."""
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        methods = {"__call__": (0, 5), "source_cache": (0, 1), "steps": (2, 3)}
        self.layers = _make_layers(DecoderLayer, cfg, cfg.num_decoder_layers, methods)
        self.decoder_norm = norm(cfg)
        self.dropout = dropout(cfg)
        if cfg.encoder == "pair":  # the token table is not trained: these layers adapt it
            self.token_dense = Dense(cfg.emb_dim, ("embed", "joined_kv"), dtype=cfg.compute_dtype)
            self.logits_dense = Dense(cfg.emb_dim, ("embed", "joined_kv"), use_bias=True)
        elif not cfg.logits_via_embedding:
            self.logits_dense = Dense(cfg.vocab_size, ("embed", "vocab"), dtype=jnp.float32)
        if cfg.pointer:
            self.pointer = Pointer(cfg)

    def __call__(
        self,
        x_ntd: Float[Array, "n t d"],
        enc_bsd: Float[Array, "b s d"],
        source_mask: SourceMask | FusedRead,
        weight_bt: Shaped[Array, "b t"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "n t d"], Float[Array, "b s"] | None]:
        """Embedded inputs -> normed states [n, t, d] and, with weights, the mass [b, s]."""
        t = x_ntd.shape[1]
        biases = (self.relpos_bias(t, t), mask_bias(jnp.tri(t, dtype=bool))[None, None])
        x = self.dropout(x_ntd, deterministic=deterministic)
        shared = (enc_bsd, biases, source_mask, weight_bt, deterministic)
        if self.config.scan_layers:
            x, masses = self.layers(x, *shared)
            mass = None if masses is None else jnp.sum(masses, axis=0)
        else:
            mass = None
            for layer in self.layers:
                x, more = layer(x, *shared)
                mass = more if mass is None else mass + more
        return self.dropout(self.decoder_norm(x), deterministic=deterministic), mass

    def start(
        self, enc_bsd: Float[Array, "b s d"], source_mask: SourceMask, variants: int, length: int
    ) -> DecodingState:
        """Empty caches for ``length`` positions of ``variants`` targets per source."""
        cfg = self.config
        if cfg.scan_layers:
            _, sources = self.layers.source_cache(None, enc_bsd)
        else:
            sources = [layer.source_cache(None, enc_bsd)[1] for layer in self.layers]

        def empty(source: jax.Array) -> jax.Array:
            *layers, b, h, _, c = source.shape
            return jnp.zeros((*layers, b * variants, h, length, c), source.dtype)

        causal = mask_bias(jnp.tri(length, dtype=bool))[None, None]
        return DecodingState(
            index=jnp.zeros((), jnp.int32),
            self_caches=jax.tree.map(empty, sources),
            source_caches=sources,
            source_mask=source_mask,
            position_bias_1htt=self.relpos_bias(length, length) + causal,
        )

    def steps(
        self, x_nwd: Float[Array, "n w d"], state: DecodingState
    ) -> tuple[Float[Array, "n w d"], DecodingState]:
        """Embedded tokens of the next w positions -> normed states [n, w, d] and the new caches."""
        table, w = state.position_bias_1htt, x_nwd.shape[1]
        if state.index.ndim:
            places_nw = state.index[:, None] + jnp.arange(w)[None]
            bias = jnp.take(table[0], places_nw, axis=1, mode="clip").transpose(1, 0, 2, 3)
        else:
            bias = jax.lax.dynamic_slice_in_dim(table, state.index, w, axis=2)
        shared = ((bias,), state.source_mask, state.index)
        x = x_nwd
        if self.config.scan_layers:
            x, caches = self.layers.steps(x, state.self_caches, state.source_caches, *shared)
        else:
            caches = []
            for layer, cache, source in zip(
                self.layers, state.self_caches, state.source_caches, strict=True
            ):
                x, cache = layer.steps(x, cache, source, *shared)
                caches.append(cache)
        return self.decoder_norm(x), dataclasses.replace(state, self_caches=caches)


def mask_source(mask_brs: jax.Array, t: int) -> SourceMask:
    """The mask [b, r, s] of each variant, for targets of `t` positions."""
    b, r, s = mask_brs.shape
    visible_br = jnp.any(mask_brs, axis=-1)
    if r > 1:  # positions of the variants lie side by side in cross-attention
        mask_brs = jnp.repeat(mask_brs, t, axis=1)
        visible_br = jnp.repeat(visible_br, t, axis=1)
    return SourceMask(mask_bias(mask_brs)[:, None], visible_br[..., None])


def whole_source(config: ReaderConfig, mask_brs: jax.Array, t: int) -> SourceMask | FusedRead:
    """The mask [b, r, s] of each variant, for whole targets of `t` positions."""
    if config.attention == "xla":
        return mask_source(mask_brs, t)
    visible_br = jnp.repeat(jnp.any(mask_brs, axis=-1), t, axis=1)
    return FusedRead(Seen.of_source(mask_brs, t), visible_nq1=visible_br[..., None])
