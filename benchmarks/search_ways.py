"""The ways to search a million vectors that `benchmarks.search` compares.

Each is built once from a file of vectors and leaves what it needs in a folder of its own. It is
then loaded from there, and searched with settings from the cheapest to the dearest.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.core.types import DeviceIndex
from atlas_jax.index.exact import exact_search
from atlas_jax.index.int8 import Int8Rows, inner_products
from atlas_jax.index.scann_index import ScannConfig, ScannIndex, build_of

K = 10
Search = Callable[[np.ndarray, Any], np.ndarray]  # queries [b, e], a setting -> rows [b, K]
Loaded = tuple[Search, Sequence[Any]]  # and the settings
_ROWS = 65_536  # quantised at a time
_MOST_BINS = 1 << 17


class Way(Protocol):
    """What all ways have."""

    name: str

    def build(self, vectors: Path, folder: Path) -> None:
        """Leave what a search needs in the folder."""

    def load(self, vectors: Path, folder: Path) -> Loaded:
        """A search, and its settings from the cheapest to the dearest."""


class Exact:
    """The library's exact search of float32 rows."""

    name = "exact, float32"

    def build(self, vectors: Path, folder: Path) -> None:
        """Nothing: the vectors are the index."""

    def load(self, vectors: Path, folder: Path) -> Loaded:
        """The vectors on the devices."""
        index = _device_index(jnp.asarray(np.load(vectors)))
        search = jax.jit(functools.partial(exact_search, k=K))
        return (lambda query_be, _: np.asarray(search(index, query_be).rows_bk)), [None]


class Int8:
    """The library's exact search of int8 rows; L are found and the K best kept by float32 scores.

    The float32 rows stay on the disk.
    """

    name = "int8 + exact rescoring"
    values, scales = "values.npy", "scales.npy"

    def build(self, vectors: Path, folder: Path) -> None:
        """Round the vectors."""
        rows_ne = np.load(vectors, mmap_mode="r")
        made = Int8Rows(np.empty(rows_ne.shape, np.int8), np.empty(len(rows_ne), np.float32))
        for start in range(0, len(rows_ne), _ROWS):
            made[start : start + _ROWS] = rows_ne[start : start + _ROWS]
        np.save(folder / self.values, made.values_ne)
        np.save(folder / self.scales, made.scales_n)

    def load(self, vectors: Path, folder: Path) -> Loaded:
        """The rounded rows on the devices."""
        index, rows_ne = self._index(folder), np.load(vectors, mmap_mode="r")
        search = jax.jit(exact_search, static_argnames="k")

        def found(query_be: np.ndarray, searched: int) -> np.ndarray:
            rows_bl = np.asarray(search(index, query_be, k=searched).rows_bk)
            return rescored(query_be, rows_bl, rows_ne)

        return found, [K, 2 * K, 4 * K]

    def _index(self, folder: Path) -> DeviceIndex:
        values, scales = (np.load(folder / name) for name in (self.values, self.scales))
        return _device_index(Int8Rows(jnp.asarray(values), jnp.asarray(scales)))


class ApproxMaxK(Int8):
    """`approx_max_k` over int8 rows, then exact rescoring, as a TPU does it.

    Elsewhere that function selects exactly. So its partial reduction is written out here: rows
    fall into bins by their number, of each bin the best is kept, and the best of these are taken.
    """

    name = "approx_max_k of int8 + exact rescoring, emulated"

    def load(self, vectors: Path, folder: Path) -> Loaded:
        """The rounded rows on the devices."""
        index, rows_ne = self._index(folder), np.load(vectors, mmap_mode="r")

        @functools.partial(jax.jit, static_argnames=("searched", "bins"))
        def search(index: DeviceIndex, query_be: jax.Array, searched: int, bins: int) -> jax.Array:
            scores_bn = inner_products(query_be, index.embeddings_ne)
            return partial_reduction(scores_bn, searched, bins)

        def found(query_be: np.ndarray, setting: tuple[int, float]) -> np.ndarray:
            searched, target = setting
            bins = bins_for(target, searched, len(rows_ne))
            rows_bl = np.asarray(search(index, query_be, searched=searched, bins=bins))
            return rescored(query_be, rows_bl, rows_ne)

        return found, [(2 * K, target) for target in (0.9, 0.95, 0.98, 0.99)] + [(4 * K, 0.99)]


class Scann:
    """The library's host search with ScaNN."""

    name = "ScaNN"
    config = ScannConfig()

    def build(self, vectors: Path, folder: Path) -> None:
        """Train and compress; the float32 rows stay where they are."""
        ScannIndex.made(np.load(vectors, mmap_mode="r"), self.config).save(folder, True)

    def _rows_file(self, vectors: Path) -> Path | None:
        """What ScaNN itself reads the rows from."""
        return vectors if self.config.rows == "memory" else None

    def load(self, vectors: Path, folder: Path) -> Loaded:
        """The saved index."""
        rows, width = np.load(vectors, mmap_mode="r").shape
        build, float32 = build_of(rows, width, self.config), np.load(vectors, mmap_mode="r")
        index = ScannIndex.load(folder, build, float32, self._rows_file(vectors))

        def found(query_be: np.ndarray, setting: tuple[float, int]) -> np.ndarray:
            return index.search(query_be, K, *setting)[0]

        shares, counts = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16), (40, 100, 200, 400)
        return found, [(share, count) for share in shares for count in counts]


class ScannOnDisk(Scann):
    """The same with codes alone in memory; the rows that are rescored are read from the disk."""

    name = "ScaNN, rows on the disk"
    config = ScannConfig(rows="disk")


class IvfPq:
    """faiss: inverted lists of product codes (4 bits, fast scan), then exact rescoring."""

    name = "faiss IVF-PQ + exact rescoring"
    file = "index.faiss"
    trained_on = 50  # rows for each list
    per_code = 4  # components that share one code of 4 bits

    def build(self, vectors: Path, folder: Path) -> None:
        """Train, compress, and write the codes without the vectors."""
        rows_ne = np.load(vectors, mmap_mode="r")
        n, width = rows_ne.shape
        lists, codes = 2 ** round(math.log2(2 * math.sqrt(n))), width // self.per_code
        index = faiss.index_factory(width, f"IVF{lists},PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
        chosen = np.random.default_rng(0).choice(n, min(n, self.trained_on * lists), replace=False)
        index.train(rows_ne[np.sort(chosen)])
        for start in range(0, n, _ROWS):
            index.add(np.ascontiguousarray(rows_ne[start : start + _ROWS]))
        faiss.write_index(index, str(folder / self.file))

    def load(self, vectors: Path, folder: Path) -> Loaded:
        """The codes, and the vectors for rescoring."""
        index: Any = faiss.read_index(str(folder / self.file))  # of inverted lists
        rows_ne = np.load(vectors, mmap_mode="r")

        def found(query_be: np.ndarray, setting: tuple[int, int]) -> np.ndarray:
            index.nprobe, searched = setting
            return rescored(query_be, index.search(query_be, searched)[1], rows_ne)

        return found, [(n, L) for n in (4, 8, 16, 32, 64, 128, 256) for L in (40, 100, 200, 400)]


WAYS: dict[str, Way] = {
    "exact": Exact(), "int8": Int8(), "approx_max_k": ApproxMaxK(), "scann": Scann(),
    "scann_on_disk": ScannOnDisk(),
    "ivfpq": IvfPq(),
}  # fmt: skip


def rescored(query_be: np.ndarray, rows_bl: np.ndarray, rows_ne: np.ndarray) -> np.ndarray:
    """The K of the rows found whose float32 inner products are the greatest; -1 is no row."""
    found_ble = rows_ne[np.maximum(rows_bl, 0)]
    scores_bl = np.matmul(found_ble, query_be[:, :, None])[:, :, 0]
    scores_bl = np.where(rows_bl < 0, -np.inf, scores_bl)
    best_bk = np.argsort(-scores_bl, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(rows_bl, best_bk, axis=1)


def bins_for(target: float, k: int, n: int) -> int:
    """Bins with which so large a share of the k best is expected to be found.

    Of k rows in random bins, one is hidden by a better one with a probability of at most
    (k - 1) / bins (Chern et al. 2022, arXiv:2206.14286, section 5).

    Returns:
      A power of two, not above n and `_MOST_BINS`.
    """
    needed = max(k, math.ceil((k - 1) / (1 - target)))
    return min(1 << (needed - 1).bit_length(), 1 << (n.bit_length() - 1), _MOST_BINS)


def partial_reduction(scores_bn: jax.Array, k: int, bins: int) -> jax.Array:
    """Rows [b, k] of the greatest scores, but at most one row of each bin; row i is in i % bins."""
    b, n = scores_bn.shape
    deep = -(-n // bins)
    padded_bn = jnp.pad(scores_bn, ((0, 0), (0, deep * bins - n)), constant_values=-jnp.inf)
    scores_bdg = padded_bn.reshape(b, deep, bins)  # d rows in each of g bins
    best_bk = jax.lax.top_k(scores_bdg.max(axis=1), k)[1]
    inside_bdk = jnp.take_along_axis(scores_bdg, best_bk[:, None, :], axis=2)
    return inside_bdk.argmax(axis=1) * bins + best_bk


def _device_index(rows: Any) -> DeviceIndex:
    tokens = np.zeros((rows.shape[0], 1), np.uint16)
    count = jnp.int32(rows.shape[0])
    return DeviceIndex(rows, tokens, tokens, count, jnp.int32(0))
