"""T5 attention: no scaling of the logits, relative positions as a bias, no other biases.

Arrays are transposed to [n, h, l, c] (rows, heads, positions, channels of a head). So both products
are plain batched matrix products, on CPU several times faster than a contraction of [n, l, h, c].
The axes of rows and heads stay separate because they are sharded over different mesh axes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from atlas_jax.core import adapters, fused
from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import Dense, softmax
from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import Array
from atlas_jax.reader.config import ReaderConfig

MASKED = -1e10  # in float32, any logit added to it is lost


class KeyValue(NamedTuple):
    """Keys and values of a sequence, each [n, h, s, c]."""

    key: Float[Array, "n h s c"]
    value: Float[Array, "n h s c"]


@flax.struct.dataclass
class FusedRead:
    """What fused attention reads.

    Attributes:
      seen: which positions each position reads.
      distances_hd: float32 biases by distance (`RelativePositionBias.by_distance`), if any.
      visible_nq1: bool, False where nothing is seen; zeros are read there. None = not asked.
    """

    seen: fused.Seen
    distances_hd: Array | None = None
    visible_nq1: Array | None = None


def mask_bias(mask: Bool[Array, "*any"]) -> Float[Array, "*any"]:
    """Float32 of any shape: 0 where the mask is True, a huge negative number elsewhere."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)


class Attention(nn.Module):
    """Multi-head attention with parameters ``query``, ``key``, ``value`` and ``out``.

    Attributes:
      reads: logical axis of the positions that are read: `source` of a source, else `length`.
    """

    config: ReaderConfig
    reads: str = "length"

    def setup(self) -> None:
        """Create the four projections, all without bias."""
        cfg = self.config
        joined = cfg.num_heads * cfg.head_dim
        # Queries start smaller by sqrt(head_dim), in place of scaling the logits.
        query_init = nn.initializers.variance_scaling(1.0 / cfg.head_dim, "fan_in", "normal")

        def project(init: nn.initializers.Initializer) -> Dense:
            return Dense(joined, ("embed", "joined_kv"), dtype=cfg.compute_dtype, kernel_init=init)

        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.query, self.key, self.value = project(query_init), project(fan_in), project(fan_in)
        self.out = Dense(
            cfg.emb_dim, ("joined_kv", "embed"), dtype=cfg.compute_dtype, kernel_init=fan_in
        )
        # One mask for all queries, as in T5X: cheap, and drawn for each head and key.
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def keys_values(self, x_nsd: Float[Array, "n s d"]) -> KeyValue:
        """Project a source, [n, s, d], to keys and values."""
        return KeyValue(
            self._split_heads(self.key(x_nsd), self.reads),
            self._split_heads(self.value(x_nsd), self.reads),
        )

    def __call__(
        self,
        x_nqd: Float[Array, "n q d"],
        source: KeyValue,
        biases: tuple[Float[Array, "#n #h #q s"], ...],
        deterministic: bool,
    ) -> tuple[Float[Array, "n q d"], Float[Array, "n h q s"]]:
        """Attend from x to the source, and to the attention's prefix in front of it if it has one.

        A prefix is seen from everywhere. Its relative position bias is 0: the method comes from
        BART, which has none.

        Args:
          x_nqd: [n, q, d], attending positions.
          source: keys and values, [n, h, s, c].
          biases: float32 arrays that broadcast to [n, h, q, s], added to the logits.
          deterministic: no dropout.

        Returns:
          [n, q, d], and the float32 probabilities of the source before dropout, [n, h, q, s].
        """
        source = KeyValue(
            adapters.behind_prefix(self, "key", source.key),
            adapters.behind_prefix(self, "value", source.value),
        )
        q_nhqc = self._split_heads(self.query(x_nqd), "length")
        logits_dtype = jnp.float32 if self.config.float32_attention_logits else q_nhqc.dtype
        logits_nhqs = jnp.einsum(
            "nhqc,nhsc->nhqs", q_nhqc, source.key, preferred_element_type=logits_dtype
        ).astype(jnp.float32)
        for bias in biases:
            logits_nhqs = _add_bias(logits_nhqs, adapters.beside_prefix(self, bias))
        probs_nhqs = softmax(logits_nhqs)
        dropped = self.dropout(probs_nhqs, deterministic=deterministic)
        y_nhqc = jnp.einsum("nhqs,nhsc->nhqc", dropped.astype(source.value.dtype), source.value)
        n, h, q, c = y_nhqc.shape
        p = adapters.prefix_length(self)
        own_nhqs = probs_nhqs[..., p:] if p else probs_nhqs
        y = y_nhqc.transpose(0, 2, 1, 3).reshape(n, q, h * c)  # heads side by side again
        return self.out(constrain(y, "batch", "length", "joined_kv")), own_nhqs

    def fused(
        self,
        x_nqd: Float[Array, "n q d"],
        source_nsd: Float[Array, "n s d"],
        read: FusedRead,
        deterministic: bool,
        weight_nq: Shaped[Array, "n q"] | None = None,
    ) -> tuple[Float[Array, "n q d"], Float[Array, "n s"] | None]:
        """Attend from x to a source by the kernels of `fused`.

        Args:
          x_nqd, source_nsd: attending positions, and those that are read.
          read: masks and biases.
          deterministic: no dropout. Its draws are those of `__call__`.
          weight_nq: weights of the attending positions; asks for the attention mass.

        Returns:
          [n, q, d], and with weights the float32 mass [n, s] (`fused.attend`).

        Raises:
          UserError: the attention has a prefix.
        """
        if adapters.prefix_length(self):
            raise UserError(
                "ReaderConfig.attention = 'fused' cannot read the prefix of an attention "
                "(DeltaConfig.kind = 'prefix'): bind ReaderConfig.attention = 'xla'"
            )
        factor_nhs, (n, s, _) = None, source_nsd.shape
        if not deterministic:
            ones = jnp.ones((n, self.config.num_heads, 1, s), jnp.float32)
            factor_nhs = self.dropout(ones, deterministic=False)[:, :, 0]
        y, mass = fused.attend(
            self.query(x_nqd), self.key(source_nsd), self.value(source_nsd), read.seen,
            read.distances_hd, self.config.num_heads, factor_nhs, weight_nq,
        )  # fmt: skip
        y = self.out(constrain(y, "batch", "length", "joined_kv"))
        return (y if read.visible_nq1 is None else jnp.where(read.visible_nq1, y, 0)), mass

    def _split_heads(self, x: jax.Array, positions: str) -> jax.Array:
        n, length, _ = x.shape
        x = x.reshape(n, length, self.config.num_heads, self.config.head_dim)  # head-major columns
        return constrain(x.transpose(0, 2, 1, 3), "batch", "heads", positions, "kv")


@jax.custom_vjp
def _add_bias(logits_nhqs: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias that broadcasts to the logits.

    The derivative is the usual one, but the sum over the rows n is a product with ones. Otherwise
    XLA on CPU joins this sum with the one along the diagonals of a position bias. That costs a
    tenth of a small model's training step.
    """
    return logits_nhqs + bias


def _add_bias_forward(logits_nhqs: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    return logits_nhqs + bias, bias.shape


def _add_bias_backward(shape: tuple[int, ...], d_nhqs: jax.Array) -> tuple[jax.Array, jax.Array]:
    d_bias = d_nhqs
    if shape[0] == 1:
        ones = jnp.ones((1, d_nhqs.shape[0]), d_nhqs.dtype)
        d_bias = jnp.tensordot(ones, d_nhqs, axes=1)
    broadcast = [axis for axis in range(1, 4) if shape[axis] == 1 < d_nhqs.shape[axis]]
    return d_nhqs, d_bias.sum(axis=broadcast, keepdims=True)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class RelativePositionBias(nn.Module):
    """The table of position biases that all layers of a stack share.

    Attributes:
      bidirectional: whether half of the buckets are for keys after the query (encoder). If not,
        these keys share bucket 0 (decoder, which masks them).
    """

    config: ReaderConfig
    bidirectional: bool

    def __call__(self, q_len: int, s_len: int) -> Float[Array, "1 h {q_len} {s_len}"]:
        """Biases of every query and key position, float32 [1, h, q_len, s_len]."""
        return _spread_distances(self.by_distance(q_len, s_len), q_len, s_len)[None]

    @nn.compact
    def by_distance(self, q_len: int, s_len: int) -> Float[Array, "h d"]:
        """Biases of key positions minus query positions from -(q_len - 1) to s_len - 1, float32."""
        cfg = self.config
        table_hp: Any = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                ("heads", "relpos_buckets"),
            ),
            (cfg.num_heads, cfg.relpos_buckets),
            jnp.float32,
        )
        distances = np.arange(-(q_len - 1), s_len)  # key position - query position
        buckets = relative_buckets(
            distances, self.bidirectional, cfg.relpos_buckets, cfg.relpos_max_distance
        )
        # A product with a one-hot array: the gradient of a look-up would be a slow scatter.
        one_hot = jax.nn.one_hot(buckets, cfg.relpos_buckets, dtype=jnp.float32)
        return table_hp @ one_hot.T


def _spread_distances(values: jax.Array, q_len: int, s_len: int) -> jax.Array:
    """[h, q_len + s_len - 1] values by distance -> [h, q_len, s_len], entry (q, s) = s - q.

    Row q holds the values shifted by q. The repeated row, read as a matrix that is one column
    narrower, shifts each line by one. The gradient of this is a sum; that of indexing is a scatter.
    """
    h, width = values.shape
    repeated = jnp.tile(jnp.pad(values, ((0, 0), (0, 1))), (1, q_len))
    return repeated[:, : q_len * width].reshape(h, q_len, width)[:, :, q_len - 1 :]


def relative_buckets(
    distances: Integer[np.ndarray, "*any"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Integer[np.ndarray, "*any"]:
    """Bucket of each distance (key position minus query position).

    In each direction, half of the buckets hold one distance each. The others grow logarithmically
    up to ``max_distance``, and larger distances share the last one (arXiv 1910.10683, section 2.1).

    Returns:
      int32 array in [0, num_buckets) with the shape of ``distances``.
    """
    offset = np.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = np.where(distances > 0, num_buckets, 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = num_buckets // 2
    # In float32 with this epsilon, as in T5X: it decides the bucket of distances on an edge.
    ratio = np.maximum(distances, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    far = exact + (np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)).astype(
        np.int32
    )
    near_or_far = np.where(distances < exact, distances, np.minimum(far, num_buckets - 1))
    return (offset + near_or_far).astype(np.int32)
