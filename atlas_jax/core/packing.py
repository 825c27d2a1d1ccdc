"""Several passages in one row: an encoder then reads real tokens in place of padding.

The inputs of a query's k passages have a fixed length l, and most are shorter. Here they are put
side by side into g < k rows of length l, each passage whole. Every token keeps the number of its
passage, its segment. A token attends to its own segment alone. Within a segment the distance of two
tokens is the same as in the passage, which is all that T5's position bias asks for. The decoder's
cross-attention has no positions, so it reads the g rows as it reads k padded inputs. The
retriever's tower counts positions anew in each segment (`places_in_segments`).

``g`` is a static number of rows a query. A batch with a query whose passages need more is read
padded, by the other branch of the same program (`packed_or_padded`).
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from atlas_jax.core.partitioning import constrain
from atlas_jax.core.types import PAD_ID, Array

Result = TypeVar("Result")

NO_SEGMENT = -1


@flax.struct.dataclass
class Packed:
    """The inputs of a query's passages, several in a row.

    Attributes:
      tokens_bgl: int32 [b, g, l], 0 where nothing is read.
      segments_bgl: int32 [b, g, l], number of the passage that a token belongs to; `NO_SEGMENT`
        behind the last passage of a row. The tokens of a passage lie side by side in one row.
      passages: k.
    """

    tokens_bgl: Array
    segments_bgl: Array
    passages: int = flax.struct.field(pytree_node=False)


Inputs = Int[Array, "b g l"] | Packed  # tokens with a row for each passage, g = k, or packed
# Tokens [b, k, l], and the rows that the passages of a query may share: 0 or less, or as many as
# there are passages, = always padded.
Part = tuple[Array, int]


def real_length(tokens: jax.Array) -> jax.Array:
    """Number of tokens up to the last real one, [..., 1]; earlier ones may be hidden (0)."""
    place = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    return jnp.max(jnp.where(tokens != PAD_ID, place + 1, 0), axis=-1, keepdims=True)


def tokens_of(inputs: Inputs) -> jax.Array:
    """Tokens of reader inputs, [b, k, l] or packed [b, g, l]."""
    return inputs.tokens_bgl if isinstance(inputs, Packed) else inputs


def passage_masks(inputs: Inputs) -> Bool[Array, "b k s"]:
    """Which source positions are real tokens of each passage; s is all positions of a query."""
    tokens = tokens_of(inputs)
    b, rows, length = tokens.shape
    if isinstance(inputs, Packed):
        k, segments_bs = inputs.passages, inputs.segments_bgl.reshape(b, rows * length)
    else:
        k, segments_bs = rows, jnp.repeat(jnp.arange(rows, dtype=jnp.int32), length)[None]
    numbers_1k1 = jnp.arange(k, dtype=jnp.int32)[None, :, None]
    real_bs = (tokens != PAD_ID).reshape(b, rows * length)
    return (segments_bs[:, None] == numbers_1k1) & real_bs[:, None]


def first_fit(lengths_bk: Int[Array, "b k"], rows: int, length: int) -> Int[Array, "b k"]:
    """Where each passage begins in `rows` rows of `length` tokens, as row * length + place.

    The longest passage comes first, and each goes to the first row that has room for it
    (first-fit decreasing: it needs at most 11/9 of the fewest possible rows, and 6/9 of a row).

    Returns:
      int32 [b, k]; -1 for a passage that no row has room for.
    """
    b, k = lengths_bk.shape
    order_bk = jnp.argsort(-lengths_bk, axis=1)

    def place(used_bg: jax.Array, n_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        room_bg = used_bg + n_b[:, None] <= length
        row_b1 = jnp.argmax(room_bg, axis=1, keepdims=True).astype(jnp.int32)
        fits_b = jnp.any(room_bg, axis=1)
        at_b = row_b1[:, 0] * length + jnp.take_along_axis(used_bg, row_b1, axis=1)[:, 0]
        taken_bg = (jnp.arange(rows, dtype=jnp.int32)[None] == row_b1) & fits_b[:, None]
        used_bg = used_bg + jnp.where(taken_bg, n_b[:, None], 0)
        return used_bg, jnp.where(fits_b, at_b, -1)

    sorted_kb = jnp.take_along_axis(lengths_bk, order_bk, axis=1).T
    _, starts_kb = jax.lax.scan(place, jnp.zeros((b, rows), jnp.int32), sorted_kb)
    back_bk = jnp.argsort(order_bk, axis=1)
    return jnp.take_along_axis(starts_kb.T, back_bk, axis=1)


def rows_needed(lengths_bk: Int[Array, "b k"], length: int) -> Int[Array, " b"]:
    """The fewest rows into which `first_fit` puts all passages of each query, int32 [b]."""
    starts_bk = first_fit(lengths_bk, lengths_bk.shape[1], length)
    last_bk = jnp.where(lengths_bk > 0, starts_bk // length + 1, 0)
    return jnp.max(last_bk, axis=1)


def pack(tokens_bkl: Int[Array, "b k l"], rows: int) -> tuple[Packed, Bool[Array, ""]]:
    """Put the inputs of each query's passages into so many rows.

    Tokens that are hidden inside a passage (0) keep their place.

    Returns:
      The packed inputs, and whether all passages of all queries found room. If not, those that
      found none are missing.
    """
    b, k, length = tokens_bkl.shape
    lengths_bk = real_length(tokens_bkl)[..., 0]
    starts_bk = first_fit(lengths_bk, rows, length)
    place_11s = jnp.arange(rows * length, dtype=jnp.int32)[None, None]
    inside_bks = (starts_bk >= 0)[..., None] & (place_11s >= starts_bk[..., None])
    inside_bks &= place_11s < (starts_bk + lengths_bk)[..., None]
    number_1k1 = jnp.arange(k, dtype=jnp.int32)[None, :, None]
    # At most one passage covers a place, so a sum finds its number, and where its token is.
    segments_bs = jnp.sum(jnp.where(inside_bks, number_1k1 + 1, 0), axis=1, dtype=jnp.int32) - 1
    origin_bks = number_1k1 * length + place_11s - starts_bk[..., None]
    origin_bs = jnp.sum(jnp.where(inside_bks, origin_bks, 0), axis=1, dtype=jnp.int32)
    flat_bs = tokens_bkl.reshape(b, k * length)  # the passages one after the other
    tokens_bs = jnp.take_along_axis(flat_bs, origin_bs, axis=1, mode="clip")
    tokens_bs = jnp.where(segments_bs == NO_SEGMENT, PAD_ID, tokens_bs)

    def in_rows(x_bs: jax.Array) -> jax.Array:
        return constrain(x_bs.reshape(b, rows, length), "batch", None, "length")

    packed = Packed(in_rows(tokens_bs), in_rows(segments_bs), k)
    return packed, jnp.all(starts_bk >= 0)


def places_in_segments(segments_nl: Int[Array, "n l"]) -> Int[Array, "n l"]:
    """How many tokens of its own segment stand before each position of a row."""
    place_1l = jnp.arange(segments_nl.shape[1], dtype=jnp.int32)[None]
    before_nl = jnp.pad(segments_nl, ((0, 0), (1, 0)), constant_values=NO_SEGMENT - 1)[:, :-1]
    begins_nl = jnp.where(segments_nl != before_nl, place_1l, 0)
    return place_1l - jax.lax.cummax(begins_nl, axis=1)


def packed_or_padded(read: Callable[..., Result], *parts: Part) -> Result:
    """`read` of the packed inputs if all of them fit, else of the padded ones, in one program.

    Args:
      read: called with the `Inputs` of each part, while tracing; both ways have to give arrays of
        the same shapes.
      parts: as many as `read` takes.
    """
    padded = [tokens for tokens, _ in parts]
    if not any(_shares(*part) for part in parts):
        return read(*padded)
    found = [pack(*part) if _shares(*part) else (part[0], True) for part in parts]
    fits = functools.reduce(jnp.logical_and, (fit for _, fit in found))
    packed = [inputs for inputs, _ in found]
    return jax.lax.cond(fits, lambda: read(*packed), lambda: read(*padded))


def packed_or_padded_loss(
    loss: Callable[..., tuple[Array, Any]], trained: Any, *parts: Part
) -> tuple[Array, Any]:
    """`packed_or_padded` of a loss that is differentiated.

    Each branch holds its forward and its backward pass. Otherwise both branches would have to keep
    what the other one needs for its backward pass.

    Args:
      loss: (trained, inputs of each part...) -> (scalar, arrays without gradient).
      trained: what the scalar has a gradient for.
      parts: as in `packed_or_padded`.
    """
    if not any(_shares(*part) for part in parts):
        return loss(trained, *(tokens for tokens, _ in parts))

    @jax.custom_vjp
    def either(trained: Any) -> tuple[Array, Any]:
        return packed_or_padded(functools.partial(loss, trained), *parts)

    def forward(trained: Any) -> tuple[Any, Any]:
        with_grad = jax.value_and_grad(loss, has_aux=True)
        return packed_or_padded(functools.partial(with_grad, trained), *parts)

    def backward(grads: Any, cotangents: Any) -> tuple[Any]:
        return (jax.tree.map(lambda g: g * cotangents[0], grads),)

    either.defvjp(forward, backward)
    return either(trained)


def _shares(tokens_bkl: jax.Array, rows: int) -> bool:
    return 0 < rows < tokens_bkl.shape[1]
