"""Read files of `torch.save` without PyTorch: the zip form and the older form of several pickles.

Both hold a pickle that describes the objects, and the raw bytes of their storages. The restricted
interpreter reads the pickle. A tensor's bytes are read from the file when they are needed, so that
only one tensor is in memory.
"""

import dataclasses
import functools
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import input_file
from atlas_jax.interop.pickles import Attributes, Maker, interpret, plain_key, walked
from atlas_jax.interop.tensors import BFLOAT16, Tensor

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the older form
_PROTOCOL = 1001
_LIMIT = 1 << 30  # most bytes of a pickle, since it only describes
# Errors of the library for an archive that is damaged, encrypted or compressed in another way.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError,
)  # fmt: skip
_PICKLE = "data.pkl"  # what a zip file of torch.save begins with
_LOCAL = b"PK\x03\x04"  # before every entry
_BETWEEN = 4096  # bytes from an entry's end to the next one, and more
_PIECE = 1 << 20
_LARGEST, _AXES = 1 << 40, 16  # of a shape
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass
class _Checksum:
    """What the zip form has of a storage's bytes; 0 is none."""

    offset: int
    size: int
    expected: int
    is_checked: bool = False

    def fits(self, file: BinaryIO, part: np.ndarray) -> bool:
        """Compare once; where `part` of the bytes is not all, they are read piece by piece."""
        if self.expected and not self.is_checked:
            if part.size == self.size:
                self.is_checked = zlib.crc32(part.data) == self.expected
                return self.is_checked
            file.seek(self.offset)
            found, left = 0, self.size
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                found = zlib.crc32(piece, found)
                left -= len(piece)
            if left or found != self.expected:
                return False
        self.is_checked = True
        return True


@dataclasses.dataclass
class _Storage:
    """One run of numbers; `offset` is the place of its first byte in the file."""

    key: str
    dtype: np.dtype
    count: int
    offset: int | None = None
    checksum: _Checksum | None = None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: strides over a storage, counted in numbers."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(path: str | os.PathLike[str]) -> Any:
    """Load a file of `torch.save`: dicts, lists and values, with a `Tensor` for each tensor.

    An `argparse.Namespace` becomes a dict of its attributes.

    Raises:
      UserError: the pickle asks for a class or function that a checkpoint does not need (it is
        named, nothing is executed); or it contains itself, or the same lists again and again;
        or the file is cut off; or a tensor is outside of its storage (it is named).
    """
    file_path = Path(path)
    try:
        with input_file(file_path).open("rb") as file:
            is_zip = file.read(4) == _LOCAL
            file.seek(0)
            tree = _load_zip(file, file_path) if is_zip else _load_legacy(file, file_path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error

    def leaf(value: Any, name: str) -> Any:
        return _tensor(value, file_path, name) if isinstance(value, _View) else value

    return walked(tree, str(path), leaf)


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a file that holds only named tensors.

    Raises:
      UserError: as `load`, or the file holds something else (it is named).
    """
    tree = load(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__} where named tensors belong")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
    return tree


def _makers() -> dict[str, Maker]:
    def rebuild(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        return _View(storage, int(start), tuple(map(int, shape)), tuple(map(int, strides)))

    def unneeded(*_: Any) -> None:
        return None

    makers: dict[str, Maker] = {
        "collections.OrderedDict": lambda pairs=(): {plain_key(k): v for k, v in pairs},
        "collections.defaultdict": lambda *_: {},
        "argparse.Namespace": lambda: Attributes(),
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.Size": lambda shape=(): tuple(shape),
        "torch.device": lambda *names: ":".join(str(plain_key(n)) for n in names),
        "pathlib.PosixPath": lambda *parts: "/".join(str(plain_key(p)) for p in parts),
    }
    for module in ("builtins", "__builtin__"):  # its name in Python 3 and 2
        makers[f"{module}.dict"] = unneeded
        makers[f"{module}.set"] = lambda values=(): set(map(plain_key, values))
    makers.update({f"torch.{name}": unneeded for name in _STORAGES})
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32"):
        makers[f"torch.{name}"] = unneeded
    return makers


def _storage_type(name: Any, path: Path) -> np.dtype:
    dtype = _STORAGES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"{path}: a storage of type {name}; known are {', '.join(_STORAGES)}")
    return dtype


# --- the zip form ----------------------------------------------------------------------


def _load_zip(file: BinaryIO, path: Path) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except _ZIP_ERRORS as error:
        raise UserError(f"{path}: {_what_is_cut(file, path)}cut off or damaged: {error}") from None
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.rpartition("/")[2] == _PICKLE]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip file, but not one of torch.save: it has no {_PICKLE}")
    root = pickles[0].removesuffix(_PICKLE)
    order = entries.get(f"{root}byteorder")
    if order is not None and _content(archive, order, path, 16) != b"little":
        raise UserError(f"{path}: written on a big-endian machine; save it on another one")
    program = io.BytesIO(_content(archive, entries[pickles[0]], path, _LIMIT))
    tree, storages = _described(program, path)
    for storage in storages:
        entry = entries.get(f"{root}data/{storage.key}")
        wrong = ""
        if entry is None:
            wrong = "is missing from the archive"
        elif entry.compress_type != zipfile.ZIP_STORED or entry.file_size < storage.nbytes:
            wrong = f"has {entry.file_size} bytes where {storage.nbytes} belong"
        if entry is None or wrong:
            user = _user_of(storage, tree, path)
            raise UserError(f"{path}: {user}storage {storage.key} {wrong}")
        storage.offset = _data_offset(file, entry, path)
        storage.checksum = _Checksum(storage.offset, entry.file_size, entry.CRC)
    return tree


def _described(program: BinaryIO, path: Path) -> tuple[Any, list[_Storage]]:
    """The objects that a pickle of the zip form describes, and their storages."""
    storages: dict[tuple[str, np.dtype, int], _Storage] = {}

    def persistent(pid: Any) -> _Storage:
        kind, key, count = _storage_id(pid, path)  # one may be seen as several types
        return storages.setdefault((key, kind, count), _Storage(key, kind, count))

    return interpret(program, str(path), _makers(), persistent), list(storages.values())


def _user_of(storage: _Storage, tree: Any, path: Path) -> str:
    """The name of the first tensor in a storage, with a colon."""
    found: list[str] = []

    def leaf(value: Any, name: str) -> None:
        if isinstance(value, _View) and value.storage.key == storage.key:
            found.append(name)

    walked(tree, str(path), leaf)
    return f"{found[0]}: " if found else ""


def _what_is_cut(file: BinaryIO, path: Path) -> str:
    """The first tensor that is cut off in an archive whose end, the directory, is missing.

    The pickle is at the beginning and gives the length of every storage.
    """
    size = os.fstat(file.fileno()).st_size
    name, at = _header(file, 0)
    if not name.endswith(_PICKLE):
        return ""
    file.seek(at)
    tree, storages = _described(file, path)
    by_name = {f"{name.removesuffix(_PICKLE)}data/{s.key}": s for s in storages}
    at = file.tell()
    while by_name:
        file.seek(at)
        ahead = file.read(_BETWEEN).find(_LOCAL)
        name, at = _header(file, at + ahead) if ahead >= 0 else ("", size)
        at = at if name else size
        storage = by_name.pop(name, None)
        if storage is not None and at + storage.nbytes > size:
            return (
                f"{_user_of(storage, tree, path)}storage {storage.key} has {max(size - at, 0)} of "
                f"{storage.nbytes} bytes: "
            )
        at += storage.nbytes if storage is not None else 0
        if at >= size and by_name:
            storage = next(iter(by_name.values()))
            return f"{_user_of(storage, tree, path)}storage {storage.key} is not in it: "
    return ""


def _header(file: BinaryIO, at: int) -> tuple[str, int]:
    """The name in an entry's local header, and where its bytes begin; ('', at) if there is none."""
    file.seek(at)
    header = file.read(30)
    if len(header) < 30 or header[:4] != _LOCAL:
        return "", at
    name, extra = struct.unpack("<HH", header[26:30])
    return file.read(name).decode("utf-8", "replace"), int(at + 30 + name + extra)


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> bytes:
    """The bytes of a small entry."""
    name = entry.filename.rpartition("/")[2]
    if entry.file_size > limit:
        raise UserError(f"{path}: its {name} is larger than any checkpoint's")
    try:
        return archive.read(entry)
    except _ZIP_ERRORS as error:
        raise UserError(f"{path}: {name} is damaged: {error}") from None


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> int:
    """Place of an entry's first byte: after its local header, whose length varies."""
    name, offset = _header(file, entry.header_offset)
    if not name:
        raise UserError(f"{path}: the entry {entry.filename} is damaged")
    return offset


def _storage_id(pid: Any, path: Path) -> tuple[np.dtype, str, int]:
    described = tuple(map(plain_key, pid[1:5])) if isinstance(pid, tuple) else ()
    if len(described) < 4 or pid[0] != "storage" or not isinstance(pid[4], int) or pid[4] < 0:
        raise UserError(f"{path}: a persistent id that is no storage")
    return _storage_type(pid[1], path), str(pid[2]), pid[4]


# --- the older form --------------------------------------------------------------------


def _load_legacy(file: BinaryIO, path: Path) -> Any:
    """Five pickles (magic number, protocol, system, object, keys), then the storages."""
    buffered = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
    read: Callable[..., Any] = functools.partial(interpret, buffered, str(path), _makers())
    not_torch = UserError(f"{path}: neither a zip file nor one of torch.save")
    if read() != _MAGIC or read() != _PROTOCOL:
        raise not_torch
    system = read()
    if not isinstance(system, dict):
        raise not_torch
    if system.get("little_endian") is not True:
        raise UserError(f"{path}: written on a big-endian machine; save it on another one")
    storages: dict[str, _Storage] = {}

    def persistent(pid: Any) -> _Storage:
        kind, key, count = _storage_id(pid, path)
        if len(pid) > 5 and pid[5] is not None:
            raise UserError(f"{path}: storage {key} is a view of another; save the file anew")
        storage = storages.setdefault(key, _Storage(key, kind, count))
        if (storage.dtype, storage.count) != (kind, count):
            raise UserError(f"{path}: storage {key} is of two types; save the file anew")
        return storage

    tree = read(persistent)
    keys = read()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path}: has no list of its storages")
    size = os.fstat(file.fileno()).st_size
    at = buffered.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise UserError(f"{path}: storage {key} belongs to no tensor")
        buffered.seek(at)
        head = buffered.read(8)
        if len(head) < 8 or struct.unpack("<q", head)[0] != storage.count:
            user = _user_of(storage, tree, path)
            raise UserError(f"{path}: {user}storage {key} is cut off or of another length")
        storage.offset = at + 8
        at += 8 + storage.nbytes
        if at > size:
            raise UserError(f"{path}: {_user_of(storage, tree, path)}cut off in storage {key}")
    return tree


# --- tensors ---------------------------------------------------------------------------


def _tensor(view: _View, path: Path, name: str) -> Tensor:
    storage, where = view.storage, f"{path}: {name}"
    sizes = [*view.shape, *view.strides, view.start]
    last = view.start + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=False))
    empty = 0 in view.shape
    if (
        len(view.shape) != len(view.strides)
        or min(sizes) < 0
        or max(sizes) > _LARGEST
        or len(view.shape) > _AXES
        or storage.offset is None
    ):
        raise UserError(f"{where}: shape {view.shape} and strides {view.strides} make no tensor")
    if not empty and (last >= storage.count or math.prod(view.shape) > storage.count):
        raise UserError(f"{where}: lies outside of its storage of {storage.count} numbers")

    def get() -> np.ndarray:
        if empty:
            return np.zeros(view.shape, storage.dtype)
        count = last + 1 - view.start
        with path.open("rb") as file:
            file.seek((storage.offset or 0) + view.start * storage.dtype.itemsize)
            raw = np.fromfile(file, np.uint8, count * storage.dtype.itemsize)
            if raw.size != count * storage.dtype.itemsize:
                raise UserError(f"{where}: the file is cut off")
            if storage.checksum is not None and not storage.checksum.fits(file, raw):
                raise UserError(f"{where}: damaged: its checksum is not the one in the file")
        flat = raw.view(storage.dtype)
        strides = tuple(s * storage.dtype.itemsize for s in view.strides)
        return np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)

    return Tensor(view.shape, storage.dtype, get, where, (name,))
