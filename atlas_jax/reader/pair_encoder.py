"""A BERT tower that reads a question and a passage, first apart and then together.

    encoder/embeddings/{position_embeddings,token_type_embeddings,layer_norm}/...
    encoder/layers_0 ... layers_{n-1}/...         as in a tower of the retriever
    encoder/matches/kernel, encoder/rarity/{kernel,bias}

The input is two blocks side by side: ``[start] question [end] padding`` and ``[start] passage [end]
padding``. The lower ``apart_layers`` see each block alone. So their states of a passage do not
depend on the question and can be kept; that is why they are not trained. The layers above see both
blocks. An extra input tells them which tokens occur in both blocks. With it, a tower that has never
compared two texts learns to do so from few examples.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from atlas_jax.core.layers import Dense
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import EOS_ID, PAD_ID, Array
from atlas_jax.encoders.bert import BertEmbeddings, BertLayer, rematerialised
from atlas_jax.reader.config import ReaderConfig

MASKED = -1e9  # finite, so that a row of padding alone still gives finite states
_NEAR = 8  # tokens on either side within which matches are counted


class Blocks(NamedTuple):
    """Where the two blocks of an input are; all [n, l].

    Attributes:
      real: True where there is no padding.
      passage: True in the second block, with its start and end tokens.
      text: True in the second block, without these two tokens: the tokens that may be copied.
      positions: int32, counted from 0 in each block.
    """

    real: Bool[Array, "n l"]
    passage: Bool[Array, "n l"]
    text: Bool[Array, "n l"]
    positions: Int[Array, "n l"]


def blocks_of(tokens_nl: Int[Array, "n l"], start_id: int) -> Blocks:
    """Find the blocks: the second begins with the first token after the first end token."""
    real = tokens_nl != PAD_ID
    ends = (tokens_nl == EOS_ID).astype(jnp.int32)
    behind = jnp.cumsum(ends, axis=1) - ends > 0
    passage = behind & real
    first_n1 = jnp.argmax(passage, axis=1)[:, None]
    place = jnp.arange(tokens_nl.shape[1], dtype=jnp.int32)[None]
    positions = jnp.maximum(jnp.where(behind, place - first_n1, place), 0)
    text = passage & (tokens_nl != EOS_ID) & (tokens_nl != start_id)
    return Blocks(real, passage, text, positions)


class PairEncoder(nn.Module):
    """The tower. Its input is embedded tokens: decoder and output share the embedding table."""

    config: ReaderConfig

    def setup(self) -> None:
        """Create the layers and the projection of the matches."""
        cfg = self.config
        self.embeddings = BertEmbeddings(cfg.tower)
        layer = rematerialised(BertLayer, cfg.tower, static_argnums=(3,))
        self.layers = [layer(cfg.tower) for _ in range(cfg.num_encoder_layers)]
        zeros = nn.initializers.zeros
        self.matches = Dense(cfg.emb_dim, ("unsharded", "embed"), kernel_init=zeros)
        self.rarity = Dense(1, ("embed", "unsharded"), use_bias=True)

    def __call__(
        self, words_nld: Float[Array, "n l d"], tokens_nl: Int[Array, "n l"], deterministic: bool
    ) -> Float[Array, "n l d"]:
        """Embedded inputs [n, l, d] of two blocks -> states [n, l, d]."""
        blocks = blocks_of(tokens_nl, self.config.start_id)
        same = blocks.passage[:, :, None] == blocks.passage[:, None, :]
        bias = jnp.where(same & blocks.real[:, None, :], 0.0, MASKED)[:, None]
        apart_nld = self._lower(words_nld, blocks.positions, bias)
        return self.together(apart_nld, words_nld, tokens_nl, deterministic)

    def apart(
        self, words_nld: Float[Array, "n l d"], tokens_nl: Int[Array, "n l"]
    ) -> Float[Array, "n l d"]:
        """States of the lower layers of single blocks, [n, l, d]; without gradient."""
        positions = jnp.broadcast_to(jnp.arange(tokens_nl.shape[1]), tokens_nl.shape)
        bias = jnp.where(tokens_nl != PAD_ID, 0.0, MASKED)[:, None, None, :]
        return self._lower(words_nld, positions, bias)

    def together(
        self,
        apart_nld: Float[Array, "n l d"],
        words_nld: Float[Array, "n l d"],
        tokens_nl: Int[Array, "n l"],
        deterministic: bool,
    ) -> Float[Array, "n l d"]:
        """The upper layers over both blocks.

        Args:
          apart_nld: states of the lower layers.
          words_nld: the embedded tokens, for the matches.
          tokens_nl: the tokens.
          deterministic: no dropout.
        """
        cfg = self.config
        x = constrain(apart_nld, "batch", "length", "embed")
        if cfg.matches:
            x = x + self.matches(self._matches(words_nld, tokens_nl)).astype(x.dtype)
        bias = jnp.where(tokens_nl != PAD_ID, 0.0, MASKED)[:, None, None, :]
        for layer in self.layers[cfg.apart_layers :]:
            x = layer(x, bias, deterministic)
        return x

    def _lower(self, words_nld: jax.Array, positions_nl: jax.Array, bias: jax.Array) -> jax.Array:
        x = self.embeddings(positions_nl, True, embedded_ble=words_nld, positions_bl=positions_nl)
        x = constrain(x, "batch", "length", "embed")
        for layer in self.layers[: self.config.apart_layers]:
            x = layer(x, bias, True)
        return jax.lax.stop_gradient(x)

    def _matches(self, words_nld: jax.Array, tokens_nl: jax.Array) -> jax.Array:
        """For each token, how well it matches the other block, [n, l, features] in float32.

        The features: 1 if the other block has the same token, else 0. This times the token's
        rarity, a learned linear function of its embedding. The greatest cosine of its embedding
        with one in the other block. The sum of the second feature over the tokens near by, and over
        the whole block.
        """
        blocks = blocks_of(tokens_nl, self.config.start_id)
        other = blocks.passage[:, :, None] != blocks.passage[:, None, :]
        seen = other & blocks.real[:, :, None] & blocks.real[:, None, :]
        same = (tokens_nl[:, :, None] == tokens_nl[:, None, :]) & seen
        own = (tokens_nl != EOS_ID) & (tokens_nl != self.config.start_id)
        exact_nl = (jnp.any(same, axis=2) & own).astype(jnp.float32)
        words = jax.lax.stop_gradient(words_nld).astype(jnp.float32)
        rare_nl = exact_nl * jax.nn.sigmoid(self.rarity(words)[..., 0])
        unit = words * jax.lax.rsqrt(jnp.sum(words**2, -1, keepdims=True) + 1e-6)
        cosine = jnp.einsum("nld,nmd->nlm", unit, unit)
        near_nl = jnp.max(jnp.where(seen & own[:, None, :], cosine, 0.0), axis=2)
        near_nl = near_nl * own.astype(jnp.float32)
        window = 2 * _NEAR + 1
        around_nl = jax.lax.reduce_window(rare_nl, 0.0, jax.lax.add, (1, window), (1, 1), "SAME")
        mine = (~other) & blocks.real[:, None, :]
        whole_nl = jnp.einsum("nlm,nm->nl", mine.astype(jnp.float32), rare_nl)
        features = (exact_nl, rare_nl, near_nl, around_nl / 4, whole_nl / 8)
        return jnp.stack(features, axis=-1)
