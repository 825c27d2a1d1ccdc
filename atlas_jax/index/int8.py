"""Passage embeddings in 8 bits: whole numbers, and one scale for each row.

Symmetric: row = scale * values with values from -127 to 127, so the largest component is kept
and any other is off by half a scale at most. A search multiplies the values as bfloat16, which
holds each of them exactly, with a bfloat16 query, and the products with the scales. On a TPU the
rows are widened inside the matrix product: it reads half the bytes of a bfloat16 index and
writes no copy. Integer products would read no less, and round the query to 8 bits as well.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.core.types import Array

INT8 = "int8"
_LARGEST = 127


@flax.struct.dataclass
class Int8Rows:
    """Embeddings in 8 bits, in memory, memory-mapped or on the devices.

    Attributes:
      values_ne: int8.
      scales_n: float32; 0 for a row of zeros. NaN for a row that has one.
    """

    values_ne: Array
    scales_n: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""
        return self.values_ne.shape

    def __setitem__(self, at: Any, floats: Array) -> None:
        """Write rows of numbers, rounded, as into any numpy array."""
        rows = quantized(np.asarray(floats))
        self.values_ne[at], self.scales_n[at] = rows.values_ne, rows.scales_n


def quantized(floats_ne: Array) -> Int8Rows:
    """Round rows to 8 bits; numpy gives numpy, and the same numbers as JAX does."""
    xp: Any = np if isinstance(floats_ne, np.ndarray) else jnp
    floats_ne = floats_ne.astype(xp.float32)
    # Not divided by 127: compilers differ in how they do that.
    scales_n = xp.max(xp.abs(floats_ne), axis=-1) * np.float32(1 / _LARGEST)
    divisors_n = xp.where(scales_n == 0, np.float32(1), scales_n)
    with np.errstate(invalid="ignore"):  # of NaN, which the scale keeps
        values_ne = xp.round(floats_ne / divisors_n[..., None]).astype(xp.int8)
    return Int8Rows(values_ne=values_ne, scales_n=scales_n)


def as_floats(rows: Any) -> Array:
    """Rows as they were before `quantized`, up to its rounding; others as they are."""
    if not isinstance(rows, Int8Rows):
        return rows
    return rows.values_ne.astype(np.float32) * rows.scales_n[..., None]


def stored_as(floats_ne: Array, dtype: str) -> Any:
    """Embeddings in the type of an index, 'float32', 'bfloat16' or 'int8'."""
    return quantized(floats_ne) if dtype == INT8 else floats_ne.astype(jnp.dtype(dtype))


def dtype_of(rows: Any) -> str:
    """What `stored_as` calls the type of these rows."""
    return INT8 if isinstance(rows, Int8Rows) else jnp.dtype(rows.dtype).name


def abstract_rows(count: int, width: int, dtype: str) -> Any:
    """Shape and type of `stored_as` of so many embeddings."""
    floats = jax.ShapeDtypeStruct((count, width), np.float32)
    return jax.eval_shape(lambda floats_ne: stored_as(floats_ne, dtype), floats)


def inner_products(query_be: Array, rows: Any) -> jax.Array:
    """Scores [b, n] in float32; the query takes the type of the rows, bfloat16 for 8 bits."""
    scaled = isinstance(rows, Int8Rows)
    rows_ne = rows.values_ne.astype(jnp.bfloat16) if scaled else rows
    scores_bn = jax.lax.dot_general(
        query_be.astype(rows_ne.dtype),
        rows_ne,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores_bn * rows.scales_n if scaled else scores_bn
