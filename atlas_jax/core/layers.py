"""Shared by reader and retriever: four layers, their product, the softmax of attention.

Every parameter has logical axes, is float32 and is named as in T5X (``kernel``, ``bias``,
``embedding``, ``scale``). Layers compute in their ``dtype``.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float, Integer

from atlas_jax.core import adapters
from atlas_jax.core.types import Array

Initializer = Callable[..., Any]

# What a layer keeps for its backward pass. Without a policy ("none") it keeps everything.
REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

default_kernel_init = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@jax.custom_vjp
def matmul(x: Float[Array, "*rows i"], kernel: Float[Array, "i o"]) -> Float[Array, "*rows o"]:
    """``x kernel`` over the last axis of x, [..., in] x [in, out] -> [..., out].

    Sums are float32; the result has the dtype of x. The derivative is the usual one. It is written
    out for two reasons. JAX would derive the kernel's gradient as a product [out, in] that is then
    transposed; for this XLA on CPU first copies the cotangent. And JAX would sum in the dtype of x,
    which misses the fast bfloat16 products on CPU.
    """
    return _product(x, kernel, (x.ndim - 1,), (0,))


def _matmul_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    x_rows = x.reshape(-1, x.shape[-1])  # all leading axes are rows
    dy_rows = dy.reshape(-1, dy.shape[-1])
    return _product(dy, kernel, (dy.ndim - 1,), (1,)), _product(x_rows, dy_rows, (0,), (0,))


def _product(
    a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]
) -> jax.Array:
    """The product over the axes given, summed in float32, in the dtype of a."""
    contracted = ((a_axes, b_axes), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32).astype(a.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def softmax(logits: Float[Array, "*rows s"]) -> Float[Array, "*rows s"]:
    """Softmax over the last axis, [..., s] -> [..., s], for attention.

    It uses the derivative that JAX offers behind a flag, which needs only the result. The default
    derivative also keeps the exponentials and the reciprocals of their sums, spread over the row.
    That is three arrays of an attention's size for each layer instead of one.
    """
    with jax.softmax_custom_jvp(True):
        return jax.nn.softmax(logits, axis=-1)


class Dense(nn.Module):
    """``x kernel (+ bias)`` over the last axis.

    Attributes:
      features: size of the output axis.
      kernel_axes: logical names of (input, output).
    """

    features: int
    kernel_axes: tuple[str, str]
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows {self.features}"]:
        """[..., in] -> [..., features]."""
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.kernel_axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        x = adapters.before(self, x.astype(self.dtype))
        y = matmul(x, kernel.astype(self.dtype))
        if self.use_bias:
            bias: Any = self.param(
                "bias",
                nn.with_logical_partitioning(initializers.zeros, self.kernel_axes[1:]),
                (self.features,),
                jnp.float32,
            )
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return adapters.after(self, x, y)


class Embed(nn.Module):
    """Look-up table, also usable as an output projection.

    Attributes:
      axes: logical names of (rows, features).
    """

    num_embeddings: int
    features: int
    axes: tuple[str, str] = ("vocab", "embed")
    dtype: Any = jnp.float32
    embedding_init: Initializer = initializers.normal(1.0)

    def setup(self) -> None:
        """Create the table, [num_embeddings, features]."""
        self.embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(self.embedding_init, self.axes),
            (self.num_embeddings, self.features),
            jnp.float32,
        )

    def __call__(self, ids: Integer[Array, "*rows"]) -> Float[Array, "*rows {self.features}"]:
        """[...] int -> [..., features]."""
        return adapters.looked_up(self, self.embedding.astype(self.dtype), ids)

    def attend(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """[..., features] -> [..., num_embeddings], in float32 (logits are)."""
        return jnp.dot(x.astype(jnp.float32), self.embedding.T)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, statistics in float32."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """[..., d] -> [..., d]."""
        scale: Any = self.param(
            "scale",
            nn.with_logical_partitioning(initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)


class LayerNorm(nn.Module):
    """BERT's layer norm, statistics in float32.

    Attributes:
      released: divide by the uncentred second moment, as the retriever of the released
        Atlas checkpoints does: (x - mean) / sqrt(mean(x^2) + eps).
    """

    epsilon: float = 1e-12
    released: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """[..., d] -> [..., d]."""
        scale: Any = self.param(
            "scale",
            nn.with_logical_partitioning(initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        bias: Any = self.param(
            "bias",
            nn.with_logical_partitioning(initializers.zeros, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        moment = jnp.mean(jnp.square(x if self.released else centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(moment + self.epsilon)
        scale, bias = (jnp.broadcast_to(one, x.shape) for one in (scale, bias))
        y = (normed * scale + bias).astype(self.dtype)
        return adapters.after(self, y, y)
