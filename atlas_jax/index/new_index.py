"""Writes a saved index; `saved.py` reads it.

Each process writes whole chunks of the embeddings. A chunk that is there counts as done, so a build
that was killed goes on. A new index is written beside the old one. Then `index.json` is replaced in
one step. So after an error or a kill at any time the previous version can still be used.
"""

import collections
import contextlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.locks import locked
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.objects import Objects, Pending, finish
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.whole import remove, unwritten
from atlas_jax.index.arrays import CHUNK, NewZarr
from atlas_jax.index.int8 import INT8, Int8Rows, dtype_of, stored_as
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import INDEX_FORMAT, MANIFEST, TYPES, IndexManifest

PROGRESS = ".index.json.unfinished"
OF_SEGMENTS = "embeddings-of-segments"  # the embeddings of a store's later segments
_LOCK = f".{MANIFEST}.lock"
_BYTES = 1 << 24  # copied at a time
_AT_ONCE = 1  # chunks that are being written while another one is filled


class NewRows:
    """Embeddings that are being written. A chunk is written when all its rows are there.

    Attributes:
      shape: rows and width.
      chunk: rows of a chunk.
    """

    def __init__(
        self, objects: Objects, name: str, count: int, width: int, dtype: str, chunk: int
    ) -> None:
        self.shape, self._dtype = (count, width), dtype
        self._arrays = [NewZarr(objects, f"{name}/rows", (count, width), dtype, chunk)]
        if dtype == INT8:
            self._arrays.append(NewZarr(objects, f"{name}/scales", (count,), np.float32, chunk))
        self.chunk = self._arrays[0].chunk
        self._begun: dict[int, tuple[list[np.ndarray], int]] = {}  # rows, and how many are there
        self._pending: collections.deque[list[Pending]] = collections.deque()

    def __setitem__(self, at: Any, rows: Any) -> None:
        """Take rows, rounded to the type of the index; each row comes once.

        Raises:
          OSError: a chunk cannot be written.
        """
        where = np.arange(self.shape[0])[at] if isinstance(at, slice) else np.asarray(at)
        if np.isscalar(rows):
            rows = np.full((len(where), self.shape[1]), rows, np.float32)
        if not isinstance(rows, Int8Rows):
            rows = np.asarray(rows)
            rows = rows if rows.dtype.name == self._dtype else stored_as(rows, self._dtype)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(rows)]
        numbers = where // self.chunk
        for number in np.unique(numbers).tolist():
            own = numbers == number
            self._take(number, where[own] - number * self.chunk, [leaf[own] for leaf in leaves])

    def _take(self, number: int, at: np.ndarray, leaves: list[np.ndarray]) -> None:
        start = number * self.chunk
        size = min(self.chunk, self.shape[0] - start)
        arrays, there = self._begun.get(number, ([], 0))
        if not arrays:
            arrays = [np.empty((size, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        for array, leaf in zip(arrays, leaves, strict=True):
            array[at] = leaf
        self._begun[number] = arrays, there + len(at)
        if there + len(at) == size:
            del self._begun[number]
            self._pending.append(
                [new.begin(start, array) for new, array in zip(self._arrays, arrays, strict=True)]
            )
            while len(self._pending) > _AT_ONCE:
                finish(self._pending.popleft())

    def wait_for_whole(self) -> None:
        """Wait for the chunks that are being written.

        Raises:
          OSError: one cannot be written.
        """
        while self._pending:
            finish(self._pending.popleft())

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
          OSError: a chunk cannot be written.
          ValueError: a chunk lacks rows.
        """
        self.wait_for_whole()
        if self._begun:
            raise ValueError(f"chunks {sorted(self._begun)} of the index lack rows")


@dataclass(frozen=True)
class Unfinished:
    """An index that is not complete yet.

    Attributes:
      embeddings_ne: to be filled, but for the chunks that are done.
      done: chunks that an earlier attempt has written.
      process, processes: of this run.
    """

    embeddings_ne: NewRows
    done: Collection[int]
    process: int = 0
    processes: int = 1


@contextlib.contextmanager
def new_index(
    directory: str | os.PathLike[str],
    store: PassageStore,
    encoder_hash: str,
    width: int,
    dtype: str = "float32",
    version: int = 0,
) -> Iterator[NewRows]:
    """Give rows [n, width] to fill, each once; when the block succeeds they are the index.

    An older index is replaced only then. Numbers for an int8 index are rounded. Only one process
    takes part.

    Args:
      store: the passages that are embedded.
      encoder_hash: identifies the passage encoder and its parameters.
      width: of the embeddings.
      dtype: "float32", "bfloat16" or "int8".
      version: how often the embeddings have been refreshed.

    Raises:
      UserError: the dtype is unknown, the directory holds something else than an index, or it
        could not be written (a full disk, no permission).
    """
    build = _Build(directory, store, encoder_hash, width, dtype, version, CHUNK)
    build.goes_on = False
    try:
        with build.held:
            try:
                build.begin()
                rows = build.rows()
                yield rows
                rows.wait()
                build.end()
            except BaseException:
                build.drop()
                raise
    except OSError as error:
        raise unwritten(directory, error) from error


@contextlib.contextmanager
def shared_index(
    directory: str | os.PathLike[str],
    store: PassageStore,
    encoder_hash: str,
    width: int,
    dtype: str = "float32",
    version: int = 0,
    chunk: int = CHUNK,
) -> Iterator[Unfinished]:
    """Like ``new_index``, for all processes of a run, each of which fills chunks of its own.

    It goes on with an attempt for the same passages, encoder, type, version and chunks that did not
    finish; any other attempt is thrown away. Chunks that were written survive a kill, and every
    error but a disk error.

    Args:
      chunk: rows of a chunk.

    Raises:
      UserError: as ``new_index``; or another process failed or is missing.
    """
    build = _Build(directory, store, encoder_hash, width, dtype, version, chunk)
    meeting = Meeting(f"index {build.objects.root}")
    try:
        with build.held:
            try:
                told = meeting.together("begin", build.begin if meeting.is_first else str)[0]
                name, done = json.loads(told)
                build.manifest["embeddings"] = name
                rows = build.rows()
                made = Unfinished(rows, frozenset(done), meeting.index, meeting.count)
                try:
                    yield made
                except (UserError, OSError) as error:
                    meeting.together("chunks", _raising(error))
                except BaseException:
                    rows.wait_for_whole()
                    raise
                meeting.together("chunks", rows.wait)
                meeting.together("end", build.end if meeting.is_first else str)
            except OSError:
                if meeting.is_first:
                    build.drop()
                raise
    except OSError as error:
        raise unwritten(directory, error) from error
    finally:
        if meeting.is_first:
            build.remove_if_empty()


def _raising(error: Exception) -> Any:
    def work() -> None:
        raise error

    return work


class _Build:
    """One index that is being written. All but `rows` is for one process."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        store: PassageStore,
        encoder_hash: str,
        width: int,
        dtype: str,
        version: int,
        chunk: int,
    ) -> None:
        """Check what is asked for.

        Raises:
          UserError: as `new_index`.
        """
        if dtype not in TYPES:
            raise UserError(f"index dtype {dtype!r}; it can be {', '.join(TYPES)}")
        self.objects, self._shown = Objects(directory), os.fspath(directory)
        self.held, self.goes_on = contextlib.ExitStack(), True  # the lock
        self.manifest = IndexManifest(
            format=INDEX_FORMAT,
            embeddings=f"embeddings-{os.urandom(4).hex()}",
            count=store.count,
            width=width,
            dtype=dtype,
            version=version,
            encoder_hash=encoder_hash,
            store_hash=store.retriever_hash,
            chunk=max(1, min(chunk, store.count)),
        )

    def begin(self) -> str:
        """Look at what is there; tells the name of the arrays and the chunks that are done."""
        is_remote = self.objects.is_remote
        folder = Path(self._shown) if is_remote else check_output_folder(self._shown)
        if not self._is_index_folder():
            raise UserError(f"{self._shown} exists and is no index; choose another directory")
        if not is_remote:
            folder.mkdir(parents=True, exist_ok=True)
            self.held.callback(self.remove_if_empty)
            self.held.enter_context(locked(folder / _LOCK, self._shown))
        found = self._progress() if self.goes_on else None
        if found is not None:
            self.manifest["embeddings"] = found
        else:
            self._remove_progress()
            self._remove_unnamed()
        done = self._done() if found is not None else []
        if self.goes_on:
            self.objects.write(PROGRESS, json.dumps(self.manifest, indent=2).encode())
        return json.dumps([self.manifest["embeddings"], done])

    def rows(self) -> NewRows:
        """The arrays to fill."""
        told = self.manifest
        shape = told["count"], told["width"]
        return NewRows(self.objects, told["embeddings"], *shape, told["dtype"], told["chunk"])

    def end(self) -> None:
        """Make it the index.

        Raises:
          Interrupted: chunks are not there; the others are kept.
        """
        if self.goes_on:
            count = -(-self.manifest["count"] // self.manifest["chunk"])
            missing = sorted(set(range(count)) - set(self._done()))
            if missing:
                name = self.objects.at(f"{self.manifest['embeddings']}/rows")
                raise Interrupted(
                    f"{name}: {len(missing)} of {count} chunks are missing, the first is "
                    f"{missing[0]}; let all processes see the same folder, let no other run write "
                    "it, and start the command again"
                )
        self.objects.write(MANIFEST, json.dumps(self.manifest, indent=2).encode())
        self._remove_progress()
        self._remove_unnamed()

    def drop(self) -> None:
        """Remove what was written."""
        self._remove_progress()
        self._remove_unnamed()

    def _progress(self) -> str | None:
        """The arrays of an unfinished index of the same kind, if there is one."""
        try:
            raw = self.objects.read(PROGRESS)
            found: IndexManifest = strict_json.parse_as(raw, IndexManifest, PROGRESS)
        except Interrupted:  # it may be there
            raise
        except UserError:  # there is none, or a damaged one
            return None
        same = {**found, "embeddings": ""} == {**self.manifest, "embeddings": ""}
        return found["embeddings"] if same else None

    def _done(self) -> list[int]:
        """The chunks of which all arrays are there."""
        name = self.manifest["embeddings"]
        arrays = ["rows", *(["scales"] if self.manifest["dtype"] == INT8 else [])]
        found = []
        for array in arrays:
            names = self.objects.names(f"{name}/{array}/c")
            parts = (PurePosixPath(one).relative_to(f"{name}/{array}/c").parts for one in names)
            found.append(
                {int(one[0]) for one in parts if one[0].isdecimal() and "." not in one[-1]}
            )
        return sorted(set.intersection(*found))

    def _is_index_folder(self) -> bool:
        if self.objects.is_remote:
            tops = {name.partition("/")[0] for name in self.objects.names()}
        else:
            folder = Path(self._shown)
            tops = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        names = (name.lstrip(".") for name in tops)
        return all(name.startswith((MANIFEST, "embeddings-")) for name in names)

    def _remove_progress(self) -> None:
        self.objects.remove(PROGRESS)

    def _remove_unnamed(self) -> None:
        """Remove half-written files, and all of arrays that `index.json` does not name."""
        try:
            raw = self.objects.read(MANIFEST)
            found: IndexManifest = strict_json.parse_as(raw, IndexManifest, MANIFEST)
            named = found["embeddings"]
        except Interrupted:  # an index may be there
            raise
        except UserError:  # no index yet, or a damaged one
            named = ""
        kept = {named.partition(".")[0], OF_SEGMENTS}
        if self.objects.is_remote:
            tops = {name.partition("/")[0] for name in self.objects.names("")}
            for top in tops:
                if top.startswith("embeddings-") and top.partition(".")[0] not in kept:
                    self.objects.remove(top)
            return
        folder = Path(self._shown)
        for path in folder.glob(".*"):
            if path.name not in (PROGRESS, _LOCK):
                remove(path)
        for path in folder.glob("embeddings-*"):
            if path.name.partition(".")[0] not in kept:
                remove(path)

    def remove_if_empty(self) -> None:
        """Remove the folder if no index was made in it."""
        if not self.objects.is_remote:
            with contextlib.suppress(OSError):  # it holds an index
                Path(self._shown).rmdir()


def save_index(
    directory: str | os.PathLike[str],
    embeddings_ne: Any,
    store: PassageStore,
    encoder_hash: str,
    version: int = 0,
) -> None:
    """Save embeddings from memory or from files, in their own type; see ``shared_index``.

    Each process of a run writes its share of the chunks.

    Args:
      embeddings_ne: float32, bfloat16 or ``Int8Rows``, one row per passage. Further rows, the
        padding of a ``DeviceIndex``, are left out.

    Raises:
      UserError: as ``shared_index``.
      ValueError: fewer rows than the store has.
    """
    rows, width = embeddings_ne.shape
    if rows < store.count:
        raise ValueError(f"{rows} embeddings for {store.count} passages of {store.directory}")
    dtype = dtype_of(embeddings_ne)
    with shared_index(directory, store, encoder_hash, width, dtype, version) as made:
        chunk, step = made.embeddings_ne.chunk, max(1, _BYTES // (4 * width))
        for number in range(made.process, -(-store.count // chunk), made.processes):
            if number in made.done:
                continue
            last = min((number + 1) * chunk, store.count)
            for start in range(number * chunk, last, step):
                at = slice(start, min(start + step, last))
                made.embeddings_ne[at] = jax.tree.map(
                    lambda x, at=at: np.asarray(x[at]), embeddings_ne
                )
