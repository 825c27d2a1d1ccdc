"""The BERT encoder (arXiv 1810.04805): post-layer-norm, learned positions, exact gelu."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import REMAT_POLICIES, Dense, Embed, LayerNorm, softmax
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID
from atlas_jax.retriever.config import RetrieverConfig

_MASKED = -1e9  # finite, so that a row of padding alone still gives finite states
_init = nn.initializers.normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    """The exact gelu, x/2 (1 + erf(x / sqrt 2)); on CPU erf costs less than jax.nn's erfc."""
    return x * (0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))))


def _dense(config: RetrieverConfig, features: int, axes: tuple[str, str], name: str) -> Dense:
    return Dense(
        features=features,
        kernel_axes=axes,
        use_bias=True,
        dtype=jnp.dtype(config.dtype),
        kernel_init=_init,
        name=name,
    )


def _layer_norm(config: RetrieverConfig, name: str) -> LayerNorm:
    return LayerNorm(
        epsilon=config.layer_norm_eps,
        released=config.released_layer_norm,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


class BertEmbeddings(nn.Module):
    """Token + position + type embedding, normalised."""

    config: RetrieverConfig

    @nn.compact
    def __call__(self, tokens_bl: jax.Array, deterministic: bool) -> jax.Array:
        """Int tokens [b, l] -> states [b, l, d]."""
        cfg = self.config

        def table(rows: int, axis: str, name: str) -> Embed:
            return Embed(
                num_embeddings=rows,
                features=cfg.hidden_dim,
                axes=(axis, "embed"),
                dtype=jnp.dtype(cfg.dtype),
                embedding_init=_init,
                name=name,
            )

        # The tokens are only looked up, never predicted, so their axis is not split: BERT's
        # 30,522 rows would not divide over most meshes.
        x_bld = table(cfg.vocab_size, "unsharded", "word_embeddings")(tokens_bl)
        positions_l = jnp.arange(tokens_bl.shape[1])
        x_bld = x_bld + table(cfg.max_positions, "length", "position_embeddings")(positions_l)
        type_0 = jnp.zeros((), jnp.int32)
        x_bld = x_bld + table(cfg.type_vocab_size, "unsharded", "token_type_embeddings")(type_0)
        x_bld = _layer_norm(cfg, "layer_norm")(x_bld)
        return nn.Dropout(cfg.dropout_rate)(x_bld, deterministic=deterministic)


class BertAttention(nn.Module):
    """Bidirectional self-attention, logits and softmax in float32."""

    config: RetrieverConfig

    @nn.compact
    def __call__(self, x_bld: jax.Array, bias_b11l: jax.Array, deterministic: bool) -> jax.Array:
        """States [b, l, d] and a float32 bias [b, 1, 1, l] over keys -> [b, l, d]."""
        cfg = self.config
        b, length, width = x_bld.shape
        head_dim = width // cfg.num_heads

        def heads(name: str) -> jax.Array:
            y_bld = _dense(cfg, width, ("embed", "joined_kv"), name)(x_bld)
            # heads before length: a plain batched product, several times faster on CPU
            y_bhlk = y_bld.reshape(b, length, cfg.num_heads, head_dim).transpose(0, 2, 1, 3)
            return constrain(y_bhlk, "batch", "heads", "length", "kv")

        query_bhlk = heads("query") * (1.0 / math.sqrt(head_dim))
        logits_bhlm = jnp.einsum(
            "bhlk,bhmk->bhlm", query_bhlk, heads("key"), preferred_element_type=jnp.float32
        )
        weights_bhlm = softmax(logits_bhlm + bias_b11l).astype(x_bld.dtype)
        # one mask for all query positions, as in T5X: masks of the full size are dear
        weights_bhlm = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
            weights_bhlm, deterministic=deterministic
        )
        mixed_bhlk = jnp.einsum("bhlm,bhmk->bhlk", weights_bhlm, heads("value"))
        mixed_bld = mixed_bhlk.transpose(0, 2, 1, 3).reshape(b, length, width)
        return _dense(cfg, width, ("joined_kv", "embed"), "output")(mixed_bld)


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by residual and layer norm."""

    config: RetrieverConfig

    @nn.compact
    def __call__(self, x_bld: jax.Array, bias_b11l: jax.Array, deterministic: bool) -> jax.Array:
        """States [b, l, d] -> [b, l, d]."""
        cfg = self.config
        y_bld = BertAttention(cfg, name="attention")(x_bld, bias_b11l, deterministic)
        y_bld = nn.Dropout(cfg.dropout_rate)(y_bld, deterministic=deterministic)
        x_bld = _layer_norm(cfg, "attention_layer_norm")(x_bld + y_bld)
        x_bld = constrain(x_bld, "batch", "length", "embed")

        y_blf = gelu(_dense(cfg, cfg.mlp_dim, ("embed", "mlp"), "intermediate")(x_bld))
        y_blf = constrain(y_blf, "batch", "length", "mlp")
        y_bld = _dense(cfg, cfg.hidden_dim, ("mlp", "embed"), "output")(y_blf)
        y_bld = nn.Dropout(cfg.dropout_rate)(y_bld, deterministic=deterministic)
        x_bld = _layer_norm(cfg, "output_layer_norm")(x_bld + y_bld)
        return constrain(x_bld, "batch", "length", "embed")


class BertEncoder(nn.Module):
    """Tokens to the last layer's states."""

    config: RetrieverConfig

    @nn.compact
    def __call__(self, tokens_bl: jax.Array, deterministic: bool = True) -> jax.Array:
        """Encode right-padded texts; id 0 is padding and is never attended to.

        Args:
            tokens_bl: int tokens with their special tokens.
            deterministic: False applies dropout (needs the rng 'dropout').

        Returns:
            States [b, l, d] in the config's dtype; those of padding mean nothing.

        Raises:
            UserError: The texts are longer than `max_positions`.
        """
        cfg = self.config
        if tokens_bl.shape[1] > cfg.max_positions:
            raise UserError(
                f"the retriever got texts of {tokens_bl.shape[1]} tokens: shorten them or raise "
                f"RetrieverConfig.max_positions = {cfg.max_positions}"
            )
        tokens_bl = tokens_bl.astype(jnp.int32)
        bias_b11l = jnp.where(tokens_bl != PAD_ID, 0.0, _MASKED)[:, None, None, :]
        x_bld = BertEmbeddings(cfg, name="embeddings")(tokens_bl, deterministic)
        x_bld = constrain(x_bld, "batch", "length", "embed")
        if cfg.scan_layers and not self.is_initializing():
            return self._scan(x_bld, bias_b11l, deterministic)
        layer = _rematerialised(BertLayer, cfg, static_argnums=(3,))
        for i in range(cfg.num_layers):
            x_bld = layer(cfg, name=f"layers_{i}")(x_bld, bias_b11l, deterministic)
        return x_bld

    def _scan(self, x_bld: jax.Array, bias_b11l: jax.Array, deterministic: bool) -> jax.Array:
        """The layers as one compiled body; their parameters are stacked here, not in storage."""
        cfg = self.config
        layers = [self.variables["params"][f"layers_{i}"] for i in range(cfg.num_layers)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), len(layers))
        layer = _rematerialised(BertLayer, cfg, static_argnums=(3,))(cfg, parent=None)

        def body(x_bld: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            params, key = inputs
            rngs = None if deterministic else {"dropout": key}
            return layer.apply({"params": params}, x_bld, bias_b11l, deterministic, rngs=rngs), None

        return jax.lax.scan(body, x_bld, (stacked, keys))[0]


def _rematerialised(layer: Any, config: RetrieverConfig, static_argnums: tuple[int, ...]) -> Any:
    """The layer class, made to compute again in the backward pass what the policy drops."""
    if config.remat_policy == "none":
        return layer
    return nn.remat(
        layer,
        policy=REMAT_POLICIES[config.remat_policy],
        prevent_cse=not config.scan_layers,
        static_argnums=static_argnums,
    )
