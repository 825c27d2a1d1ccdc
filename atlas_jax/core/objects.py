"""Files below a folder, or objects below a name in a bucket, read and written through TensorStore.

A root is a folder of this machine, or an address: gs://bucket/name. Every object is written whole
or not at all, without a name that could be seen half-written. Many are read, and written, at the
same time.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import tensorstore
from etils import epath

from atlas_jax.core.errors import Interrupted, UserError, one_line
from atlas_jax.core.paths import check_fetched, check_name, is_remote

_BUCKETS = "gs://"
_LOCK = ".__lock"  # ends the name under which TensorStore writes a file; a kill leaves it
_NOTES = re.compile(r"\s\[[\w ]+='.*", re.DOTALL)
_CONTEXT = tensorstore.Context()  # one for all, so that all share its threads


class Pending(Protocol):
    """What is being written; `result` waits for it."""

    def result(self) -> Any:
        """Wait; raise what went wrong."""


class Objects:
    """The objects below one root; their names are relative to it.

    Attributes:
      root: the folder or address, without a slash at its end.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Touch nothing yet.

        Raises:
          UserError: no folder can be called so, or it is an address of another kind.
        """
        text = os.fspath(root) or "."
        self.root = text.rstrip("/") or "/"
        check_name(self.root)
        self.is_remote = is_remote(self.root)
        if self.is_remote and not self.root.startswith(_BUCKETS):
            raise UserError(f"{self.root}: expected a folder, or an address in {_BUCKETS}")

    def at(self, name: str) -> str:
        """Where an object lies, for messages."""
        return f"{self.root}/{name}"

    def below(self, name: str) -> "Objects":
        """The objects whose names begin with this folder's."""
        return Objects(self.at(name))

    def spec(self, name: str = "") -> Any:
        """TensorStore's key-value store of what lies below a name."""
        tail = f"{name.strip('/')}/" if name else ""
        if self.is_remote:
            return f"{_url(self.root)}/{tail}"
        return {"driver": "file", "path": f"{os.path.abspath(self.root)}/{tail}"}

    @functools.cached_property
    def _store(self) -> Any:
        return self._result("", lambda: tensorstore.KvStore.open(self.spec(), context=_CONTEXT))

    def has(self, name: str) -> bool:
        """Whether there is such an object.

        Raises:
          UserError: the place cannot be reached.
        """
        if not self.is_remote:
            try:
                return Path(self.at(name)).is_file()
            except OSError as error:
                raise UserError(f"{self.at(name)}: {error.strerror}") from error
        return bool(self._got(name, slice(0, 0)).state == "value")

    def read(self, name: str) -> bytes:
        """All of an object.

        Raises:
          UserError: there is none, it cannot be read, or git-lfs has put a pointer in its place.
        """
        if not self.is_remote:
            check_fetched(Path(self.at(name)))
        found = self._got(name, None)
        if found.state != "value":
            raise UserError(f"{self.at(name)}: no such file")
        return bytes(found.value)

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """All of several objects, read at the same time; see `read`."""
        begun = [self._store.read(name) for name in names]
        return [self._part(name, None, future) for name, future in zip(names, begun, strict=True)]

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of objects, all read at the same time.

        Args:
          wanted: name, first byte, and the byte behind the last.

        Raises:
          UserError: an object is missing or shorter than that, or cannot be read.
        """
        return self.begin_ranges(wanted)()

    def begin_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> Callable[[], list[bytes]]:
        """Begin to read parts of objects, see `ranges`; call the result to have them."""
        begun = [self._store.read(name, byte_range=slice(a, b)) for name, a, b in wanted]
        return lambda: [
            self._part(name, b - a, future)
            for (name, a, b), future in zip(wanted, begun, strict=True)
        ]

    def _part(self, name: str, size: int | None, future: Any) -> bytes:
        found = self._result(name, lambda: future)
        if found.state != "value" or size is not None and len(found.value) != size:
            raise UserError(f"{self.at(name)}: no such file, or it is cut off")
        return bytes(found.value)

    def check_size(self, name: str, size: int) -> None:
        """Refuse an object that has not so many bytes; in a bucket, only one that has fewer.

        Raises:
          UserError: it is missing, of another size, or a pointer of git-lfs.
        """
        if self.is_remote:
            self.ranges([(name, max(size - 1, 0), size)])
            return
        path = Path(self.at(name))
        try:
            check_fetched(path)
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        if found != size:
            raise UserError(f"{path}: it has {found} bytes instead of {size}")

    def _got(self, name: str, part: slice | None) -> Any:
        return self._result(name, lambda: self._store.read(name, byte_range=part))

    def _result(self, name: str, begin: Callable[[], Any]) -> Any:
        """What TensorStore gives, or an error that says where; the objects are as they were."""
        try:
            return begin().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise Interrupted(f"{self.at(name)}: {problem_of(error)}") from error

    def names(self, below: str = "") -> list[str]:
        """The names of all objects, or of those in one folder, in order.

        Raises:
          UserError: the place cannot be reached.
        """
        if not self.is_remote:
            top = Path(self.root) / below
            files = (path for path in top.rglob("*") if path.is_file()) if top.is_dir() else ()
            found = (path.relative_to(self.root).as_posix() for path in files)
            return sorted(name for name in found if not name.endswith(_LOCK))
        keys = self._result(below, lambda: self._store.list(_span(below)))
        return sorted(key.decode() for key in keys)

    def write(self, name: str, content: bytes) -> None:
        """Write one object, whole.

        Raises:
          OSError: it cannot be written.
        """
        finish([self.begin(name, content)])

    def begin(self, name: str, content: bytes) -> Pending:
        """Begin to write one object; `finish` waits for it."""
        future: Pending = self._store.write(name, content)
        return future

    def remove(self, below: str = "") -> None:
        """Remove an object, or all that lie in a folder; "" removes everything.

        Raises:
          OSError: objects of a bucket cannot be removed.
        """
        if not self.is_remote:
            path = Path(self.root) / below
            if path.is_file():
                path.unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            return
        finish([self._store.delete_range(_span(below))])  # many at a time
        if below:
            finish([self._store.write(below, None)])


def _span(below: str) -> Any:
    """The names in a folder; "" = all."""
    # In this order of characters the one behind the slash is 0.
    first, end = (f"{below}/", f"{below}0") if below else ("", "")
    return tensorstore.KvStore.KeyRange(first, end)


def _url(root: str) -> str:
    """The address by which TensorStore knows a root; tests put memory in its place."""
    return root


def place_of(root: str | os.PathLike[str]) -> Path:
    """A root as a path: of the disk, or one that shows and joins names as one."""
    return cast(Path, epath.Path(root)) if is_remote(root) else Path(root)


def finish(begun: Iterable[Pending]) -> None:
    """Wait for all that is being written.

    Raises:
      OSError: one of them could not be written.
    """
    try:
        for one in list(begun):
            one.result()
    except (ValueError, RuntimeError) as error:
        raise OSError(problem_of(error)) from error


def problem_of(error: Exception) -> str:
    """What TensorStore says went wrong, without the specification that it puts behind."""
    return one_line(_NOTES.sub("", str(error)))


def open_array(spec: dict[str, Any]) -> Any:
    """A TensorStore array that is being opened, in the context of all objects."""
    return tensorstore.open(spec, context=_CONTEXT)
