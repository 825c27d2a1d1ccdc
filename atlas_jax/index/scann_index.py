"""One array of embeddings indexed by ScaNN, in memory and on disk.

On disk it is a folder with ScaNN's own files and `manifest.json`, which says what was indexed, how,
and what the files hold. ScaNN rescores float32 rows. Where the embeddings lie in float32 in a file
already, ScaNN's file of rows is left out, and read from there. Or memory holds the codes alone, a
product quantisation of 4 bits for two numbers, and rows that are rescored are read from the disk.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float, Int
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.types import NO_ROW, Array

MANIFEST = "manifest.json"
_FORMAT = 1
_ASSETS, _ROWS = "scann_assets.pbtxt", "dataset.npy"
# Anything else in the folder is refused: ScaNN would unpickle a file of document ids.
_FILES = {
    _ASSETS, _ROWS, "scann_config.pb", "ah_codebook.pb", "hashed_dataset.npy",
    "datapoint_to_token.npy", "serialized_partitioner.pb",
}  # fmt: skip
_TRAINED_ON = 250_000  # rows at most, from which leaves are drawn


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """Which kind of ScaNN index is used for which size, as ScaNN's documentation advises.

    Attributes:
      hash_from: from this many passages on, score compressed rows (asymmetric hashing) and
        rescore the best. With fewer, search by brute force, which is exact.
      tree_from: from this many passages on, also divide them into sqrt(n) leaves.
      leaves_searched: share of the leaves that a query searches, above 0, at most 1.
      rescored: least number of rows that are rescored exactly per query; never fewer than 4 k.
      rows: where the rows are that are rescored. 'memory': all of them in float32. 'disk': only
        their codes are in memory, a sixteenth of it, and the saved index is read for each query.
      hash_threshold: anisotropic quantisation threshold.
    """

    hash_from: bounds.AtLeast0 = 20_000
    tree_from: bounds.AtLeast0 = 100_000
    leaves_searched: Annotated[float, Meta(gt=0, le=1)] = 0.1
    rescored: bounds.AtLeast1 = 200
    rows: Literal["memory", "disk"] = "memory"
    hash_threshold: bounds.Share = 0.2

    def __post_init__(self) -> None:
        """Refuse sizes in the wrong order and shares out of range.

        Raises:
          UserError: names the binding at fault.
        """
        bounds.check(self)
        if self.hash_from > self.tree_from:
            raise UserError("ScannConfig.hash_from has to be between 0 and ScannConfig.tree_from")


class Build(TypedDict):
    """Everything that decides how rows are indexed; a search can choose all else."""

    scann: str
    rows: bounds.Count
    width: bounds.Width
    leaves: bounds.Count
    hash_threshold: bounds.Share | None
    codes_only: NotRequired[Literal[True]]  # without the rows that are rescored


class _Manifest(TypedDict):
    """The content of manifest.json; a file's size in bytes and its BLAKE2b."""

    format: int
    build: Build
    files: dict[str, tuple[bounds.Count, str]]


class Unusable(Exception):
    """A saved ScaNN index is missing, damaged, or was built in another way; says which."""


def build_of(rows: int, width: int, config: ScannConfig) -> Build:
    """How so many rows are indexed.

    Raises:
      UserError: ScaNN is not installed.
    """
    _ops()
    hashed, tree = rows >= config.hash_from, rows >= config.tree_from
    build = Build(
        scann=metadata.version("scann"),
        rows=rows,
        width=width,
        leaves=max(1, round(math.sqrt(rows))) if tree else 0,
        hash_threshold=config.hash_threshold if hashed else None,
    )
    if hashed and config.rows == "disk":
        build["codes_only"] = True
    return build


class ScannIndex:
    """ScaNN over the rows of one array.

    Attributes:
      count: rows.
      kind: 'brute force', which is exact, 'hashed', or 'tree, hashed'.
    """

    def __init__(self, scann: Any, build: Build, rows_ne: Any) -> None:
        """Take an index of ScaNN's; see `made` and `load`."""
        self._scann, self._build, self.count = scann, build, build["rows"]
        self._rows_ne = rows_ne if "codes_only" in build else None  # else ScaNN has them
        self._leaves = build["leaves"]
        hashed = "tree, hashed" if self._leaves else "hashed"
        self.kind = "brute force" if build["hash_threshold"] is None else hashed

    @classmethod
    def made(cls, embeddings_ne: Float[Array, "n e"], config: ScannConfig) -> "ScannIndex":
        """Index rows in memory. ScaNN draws its leaves at random, so two builds may differ a bit.

        Args:
          embeddings_ne: float32 or bfloat16, in memory or to be read. With ``ScannConfig.rows =
            'disk'`` it is kept, and read by each search.

        Raises:
          UserError: ScaNN is not installed.
        """
        n, width = embeddings_ne.shape
        build = build_of(n, width, config)
        rows_ne = np.asarray(embeddings_ne, np.float32)
        builder = _ops().builder(rows_ne, min(10, n), "dot_product")
        if build["leaves"]:
            builder = builder.tree(
                num_leaves=build["leaves"],
                num_leaves_to_search=build["leaves"],  # each search says how many
                training_sample_size=min(n, _TRAINED_ON),
            )
        threshold = build["hash_threshold"]
        if threshold is None:
            builder = builder.score_brute_force()
        else:
            builder = builder.score_ah(2, anisotropic_quantization_threshold=threshold)
            if "codes_only" not in build:
                builder = builder.reorder(min(n, config.rescored))
        return cls(builder.build(), build, embeddings_ne)

    def search(
        self, query_be: Float[Array, "b e"], wanted: int, leaves_share: float, rescored: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best rows found, int32 [b, wanted], and their exact inner products.

        Args:
          query_be: float32.
          wanted: rows for each query; -1 with the score -inf where fewer were found.
          leaves_share: share of the leaves that is searched, where there are any.
          rescored: rows that are rescored exactly.
        """
        options, found = dict[str, Any](), min(wanted, self.count)
        if self._rows_ne is not None:
            found = min(max(wanted, rescored), self.count)
        elif self._build["hash_threshold"] is not None:
            options["pre_reorder_num_neighbors"] = min(rescored, self.count)
        if self._leaves:
            options["leaves_to_search"] = max(1, math.ceil(self._leaves * leaves_share))
        rows_bc, scores_bc = self._scann.search_batched_parallel(
            query_be, final_num_neighbors=found, **options
        )
        # ScaNN fills up with row 0 and score NaN where it found too few.
        none_bc = np.isnan(scores_bc)
        rows_bc = np.where(none_bc, NO_ROW, rows_bc.astype(np.int32))
        scores_bc = np.where(none_bc, -np.inf, scores_bc).astype(np.float32)
        if self._rows_ne is None:
            return rows_bc, scores_bc
        queries_be = np.asarray(query_be)
        return rescored_from(self._rows_ne, queries_be, rows_bc, min(wanted, self.count))

    def save(self, folder: Path, in_float32: bool) -> None:
        """Write ScaNN's files and the manifest into an empty folder.

        Args:
          in_float32: whether the rows lie in a file of their own in float32, and `load` will be
            told that file.

        Raises:
          OSError: it could not be written.
        """
        self._scann.serialize(str(folder), True)
        if in_float32 and "codes_only" not in self._build:
            (folder / _ROWS).unlink()
        files = {path.name: _content(path) for path in sorted(folder.iterdir())}
        strange = set(files) - _FILES
        if strange:
            raise RuntimeError(f"this version of ScaNN writes files unknown here: {strange}")
        manifest = _Manifest(format=_FORMAT, build=self._build, files=files)
        with atomic_text(folder / MANIFEST) as file:
            json.dump(manifest, file, indent=2)

    @classmethod
    def load(
        cls, folder: Path, build: Build, rows_ne: Any, float32_file: Path | None = None
    ) -> "ScannIndex":
        """Open a saved index.

        Args:
          build: what it has to be of.
          rows_ne: the rows that it is of, float32 or bfloat16; read where it has only their codes.
          float32_file: a .npy file with the rows, if they are not in the folder.

        Raises:
          Unusable: there is none, it was built in another way or by another version of ScaNN, or
            a file is missing or damaged.
        """
        try:
            manifest: _Manifest = strict_json.read(folder / MANIFEST, _Manifest)
        except UserError as error:
            raise Unusable(str(error)) from error
        if manifest["format"] != _FORMAT or manifest["build"] != build:
            raise Unusable(f"{folder} was built in another way")
        found = {path.name for path in folder.iterdir()} - {MANIFEST}
        has_rows = not float32_file and "codes_only" not in build
        if (
            found != set(manifest["files"])
            or found - _FILES
            or has_rows != (_ROWS in manifest["files"])
        ):
            raise Unusable(f"{folder}: its files are not those that {MANIFEST} names")
        for name, expected in manifest["files"].items():
            if _content(folder / name) != tuple(expected):
                raise Unusable(f"{folder / name} is damaged")
        assets = (folder / _ASSETS).read_text("utf-8")
        if float32_file is not None:
            path = os.path.relpath(float32_file, folder)
            assets = assets.replace(f'"{_ROWS}"', f'"{path}"')
        ops = _ops()
        try:
            searcher = ops.ScannSearcher(ops.scann_pybind.ScannNumpy(str(folder), assets))
            return cls(searcher, build, rows_ne)
        except RuntimeError as error:
            raise Unusable(f"{folder} cannot be read by ScaNN: {error}") from error


def rescored_from(
    rows_ne: Any, query_be: Float[Array, "b e"], found_bc: Int[np.ndarray, "b c"], k: int
) -> tuple[Int[np.ndarray, "b {k}"], Float[np.ndarray, "b {k}"]]:
    """The k rows found with the greatest exact inner products, int32 [b, k], and these.

    Args:
      rows_ne: float32 or bfloat16; only what was found is read.
      found_bc: rows; -1 is none, and has the score -inf.
    """
    scores_bc = np.full(found_bc.shape, -np.inf, np.float32)
    for query_e, found_c, scores_c in zip(query_be, found_bc, scores_bc, strict=True):
        real = np.flatnonzero(found_c != NO_ROW)
        at = real[np.argsort(found_c[real])]  # in the order of the file
        scores_c[at] = np.asarray(rows_ne[found_c[at]], np.float32) @ query_e
    best_bk = np.argsort(-scores_bc, axis=1, kind="stable")[:, :k]
    rows_bk = np.take_along_axis(found_bc, best_bk, axis=1)
    return rows_bk, np.take_along_axis(scores_bc, best_bk, axis=1)


def _content(path: Path) -> tuple[int, str]:
    """A file's size and hash."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for part in iter(functools.partial(file.read, 1 << 22), b""):
            digest.update(part)
    return path.stat().st_size, digest.hexdigest()


def _ops() -> Any:
    """ScaNN's Python module.

    Raises:
      UserError: it is not installed.
    """
    try:
        from scann import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"ScaNN cannot be imported ({error}); it exists for Linux only: pip install "
            "scann there, or use exact search"
        ) from error
    return scann_ops_pybind
