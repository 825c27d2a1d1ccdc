"""Passage embeddings in 8 bits: whole numbers, and one scale for each row.

Rounding is symmetric: row = scale * values, with values from -127 to 127. So the largest component
is exact and any other is off by at most half a scale. A search converts the values to bfloat16,
which holds each of them exactly, and multiplies them with a bfloat16 query. The products are then
multiplied with the scales. On a TPU the conversion happens inside the matrix product: it reads half
the bytes of a bfloat16 index and writes no copy. Integer products would read as many bytes, and
would round the query to 8 bits as well.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from atlas_jax.core.types import Array

INT8 = "int8"
_LARGEST = 127


@flax.struct.dataclass
class Int8Rows:
    """Embeddings in 8 bits, in memory, memory-mapped or on the devices.

    Attributes:
      values_ne: int8.
      scales_n: float32; 0 for a row of zeros, NaN for a row that contains a NaN.
    """

    values_ne: Array
    scales_n: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""
        return self.values_ne.shape

    def __setitem__(self, at: Any, floats: Array) -> None:
        """Round rows of numbers and write them, as into any numpy array."""
        rows = quantized(np.asarray(floats))
        self.values_ne[at], self.scales_n[at] = rows.values_ne, rows.scales_n


def quantized(floats_ne: Float[Array, "*rows e"]) -> Int8Rows:
    """Round rows to 8 bits. NumPy arrays give NumPy arrays, with the same numbers as JAX."""
    xp: Any = np if isinstance(floats_ne, np.ndarray) else jnp
    floats_ne = floats_ne.astype(xp.float32)
    # Multiplied, not divided by 127: compilers round the division differently.
    scales_n = xp.max(xp.abs(floats_ne), axis=-1) * np.float32(1 / _LARGEST)
    divisors_n = xp.where(scales_n == 0, np.float32(1), scales_n)
    with np.errstate(invalid="ignore"):  # NaN as a whole number; the scale is NaN then
        values_ne = xp.round(floats_ne / divisors_n[..., None]).astype(xp.int8)
    return Int8Rows(values_ne=values_ne, scales_n=scales_n)


def as_floats(rows: Any) -> Array:
    """Undo `quantized`, up to its rounding; other arrays are returned as they are."""
    if not isinstance(rows, Int8Rows):
        return rows
    return rows.values_ne.astype(np.float32) * rows.scales_n[..., None]


def stored_as(floats_ne: Float[Array, "*rows e"], dtype: str) -> Any:
    """Embeddings in the type of an index, 'float32', 'bfloat16' or 'int8'."""
    return quantized(floats_ne) if dtype == INT8 else floats_ne.astype(jnp.dtype(dtype))


def dtype_of(rows: Any) -> str:
    """The type of these rows by the names of `stored_as`."""
    return INT8 if isinstance(rows, Int8Rows) else jnp.dtype(rows.dtype).name


def abstract_rows(count: int, width: int, dtype: str) -> Any:
    """Shape and type that `stored_as` gives for so many embeddings."""
    floats = jax.ShapeDtypeStruct((count, width), np.float32)
    return jax.eval_shape(lambda floats_ne: stored_as(floats_ne, dtype), floats)


def inner_products(query_be: Float[Array, "b e"], rows: Any) -> Float[Array, "b n"]:
    """Scores [b, n] in float32. The query is rounded to the rows' type (bfloat16 for int8)."""
    scaled = isinstance(rows, Int8Rows)
    rows_ne = rows.values_ne.astype(jnp.bfloat16) if scaled else rows
    scores_bn = jax.lax.dot_general(
        query_be.astype(rows_ne.dtype),
        rows_ne,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores_bn * rows.scales_n[None] if scaled else scores_bn
