"""Which positions a text encoder attends to: as a bias, or for fused attention as segments."""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from atlas_jax.core.errors import UserError
from atlas_jax.core.fused import UNREAD, Seen
from atlas_jax.core.types import Array
from atlas_jax.encoders.config import EncoderConfig

_MASKED = -1e9  # finite, so that a row of padding alone still gives finite states


def attention_of(
    config: EncoderConfig,
    mask: Bool[Array, "b l"] | Bool[Array, "b m l"],
    segments_bl: Int[Array, "b l"] | None = None,
) -> Float[Array, "b 1 _ l"] | Seen:
    """The bias of `attention_bias`, or for fused attention the segments that say the same.

    Args:
        segments_bl: of texts that share a row; the mask is then [b, l].

    Raises:
        UserError: fused attention, and readers of a row that see different keys.
    """
    if config.attention == "xla":
        return attention_bias(mask if segments_bl is None else within(mask, segments_bl))
    if mask.ndim == 3:
        raise UserError(
            f"{type(config).__name__}.attention = 'fused' reads the same keys from all positions "
            "of a text, but this objective hides some from some: bind 'xla'"
        )
    own_bl = jnp.zeros(mask.shape, jnp.int32) if segments_bl is None else segments_bl
    seen_bl = jnp.where(mask, own_bl, UNREAD)
    return Seen(seen_bl, seen_bl)


def within(mask_bl: Bool[Array, "b l"], segments_bl: Int[Array, "b l"]) -> Bool[Array, "b l l"]:
    """True where a key, [row, reader, key], is real and of the reader's own segment."""
    return mask_bl[:, None, :] & (segments_bl[:, :, None] == segments_bl[:, None, :])


def attention_bias(
    mask: Bool[Array, "b l"] | Bool[Array, "b m l"],
) -> Float[Array, "b 1 _ l"]:
    """True where one of l keys may be read, [b, l], or by each of m readers, [b, m, l].

    Returns:
        A float32 bias [b, 1, 1 or m, l].
    """
    bias = jnp.where(mask, 0.0, _MASKED)
    return bias[:, None, None, :] if mask.ndim == 2 else bias[:, None]
