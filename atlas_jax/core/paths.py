"""One interface to files on a disk and objects in a bucket (gs://bucket/name).

An object in a bucket is never seen half-written. So a bucket needs one write where a disk needs a
temporary name and a rename.

Impossible file names are refused here, and so are paths that are not regular files. To read a pipe
may take for ever; to rename a file over a device takes the device away from all programs.
"""

import atexit
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from etils import epath

from atlas_jax.core.errors import UserError, one_line

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, as Linux has it
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_POINTER, _LONGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024  # bytes


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A `pathlib` path, or for a bucket a path object that behaves like one.

    Raises:
      UserError: no file can have this name, or the package for this kind of bucket is missing.
    """
    text = os.fspath(path)
    check_name(text)
    if not is_remote(text):
        return Path(text)
    import fsspec  # only here: most runs name no bucket, and it takes a hundredth of a start

    try:
        fsspec.get_filesystem_class("gcs" if text.startswith("gs://") else text.split(":")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"{text}: {error}; gs:// needs the extra [tpu], which has gcsfs") from error
    return cast(Path, epath.Path(text))


def check_name(text: str) -> None:
    """Refuse a name that no file can have.

    Raises:
      UserError: the path holds a null byte or half a character, or is too long.
    """
    problem = text_problem(text)
    if problem:
        raise UserError(f"the path {ascii(text)} holds {problem}; no file can be called so")
    names = text.split("/")
    longest = max(names, key=len)
    if not is_remote(text) and (
        len(os.fsencode(longest)) > _LONGEST_NAME or len(os.fsencode(text)) > _LONGEST_PATH
    ):
        raise UserError(
            f"the path {text[:60]}... is too long: a name may have {_LONGEST_NAME} bytes, a whole "
            f"path {_LONGEST_PATH}"
        )


def text_problem(text: str) -> str:
    """The first fault of a text that no file, path or tokenizer accepts; '' if there is none."""
    if "\0" in text:
        return "a null byte"
    half = _HALF_CHARACTER.search(text)
    if half is None:
        return ""
    # Python reads a byte of the command line that is not UTF-8 as one of these.
    if 0xDC80 <= ord(half[0]) <= 0xDCFF:
        return f"the byte 0x{ord(half[0]) - 0xDC00:02x}, which is not UTF-8"
    return f"half a character, {ascii(half[0])}"


def kind_of(path: Path) -> str:
    """'' for a regular file or an object in a bucket, 'nothing', or the name of another kind.

    Raises:
      UserError: the path cannot be examined.
    """
    try:
        if is_remote(path):
            return "" if path.is_file() else "a folder" if path.is_dir() else "nothing"
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or one_line(error)}") from error
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def input_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file to read.

    Raises:
      UserError: there is none, it is no regular file (to read a pipe may take for ever), or
        git-lfs has put a pointer in its place.
    """
    found = as_path(path)
    kind = kind_of(found)
    if kind == "nothing":
        raise UserError(f"{path}: no such file")
    if kind:
        raise UserError(f"{path} is {kind}; a regular file is needed")
    check_fetched(found)
    return found


def expect_bytes(handle: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Tell the system which bytes will be read soon, so that it reads all of them at once.

    Args:
      handle: of an open file.
      ranges: first byte and the byte behind the last. Only Linux is told.
    """
    if hasattr(os, "posix_fadvise"):
        for start, end in ranges:
            os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_WILLNEED)


def check_fetched(path: Path) -> None:
    """Refuse the few lines that git-lfs leaves in the place of a file that was not fetched.

    Raises:
      UserError: it is such a pointer; says what fetches the file.
    """
    if is_remote(path):
        return
    try:
        if path.stat().st_size > _LONGEST_POINTER:
            return
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError:
        return  # whoever reads it will tell
    if begin == _POINTER:
        raise UserError(
            f"{path} is a pointer of git-lfs, not the file: run `git lfs pull` in its folder, or "
            "download the file by other means"
        )


def check_folder_fetched(folder: Path) -> None:
    """`check_fetched` of every file below a folder that another library reads."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            check_fetched(file)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All of a file.

    Raises:
      UserError: there is no such regular file, or it cannot be read.
    """
    try:
        return input_file(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """All of a UTF-8 file, without a byte order mark.

    Raises:
      UserError: there is no such regular file, it cannot be read, or it is not UTF-8.
    """
    return utf8_text(read_bytes(path), str(path))


def utf8_text(raw: bytes, where: str) -> str:
    """Bytes of UTF-8 as text, without a byte order mark.

    Raises:
      UserError: the bytes are not UTF-8; `where` begins the message.
    """
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {error.start + 1} (0x{raw[error.start]:02x}); convert "
            "the file to UTF-8"
        ) from None


def check_output_file(path: str | os.PathLike[str], name: str = "") -> Path:
    """The path for an output file, checked: nothing is there yet, or a regular file.

    Args:
      name: the flag or binding that gives the path, for the message.

    Raises:
      UserError: the path is a folder, a device, a pipe or a socket, or is below a file.
    """
    target, label = _named(path, name)
    if is_remote(path):
        return target
    kind = kind_of(target)
    if kind not in ("", "nothing"):
        raise UserError(f"{label}: is {kind}; choose the name of a file, or one that is not there")
    _check_above(target, label)
    return target


def check_output_folder(path: str | os.PathLike[str], name: str = "") -> Path:
    """The path for an output folder, checked: nothing is there yet, or a folder.

    Args:
      name: as in `check_output_file`.

    Raises:
      UserError: something else is there, or the path is below a file.
    """
    target, label = _named(path, name)
    if is_remote(path):
        return target
    kind = kind_of(target)
    if kind not in ("a folder", "nothing"):
        raise UserError(f"{label}: is {kind or 'a file'}; choose a folder, or one to be made")
    if kind == "nothing":
        _check_above(target, label)
    elif not os.access(target, os.W_OK | os.X_OK):
        raise UserError(f"{label}: there is no permission to write into it")
    return target


def _named(path: str | os.PathLike[str], name: str) -> tuple[Path, str]:
    """A path, and what a message calls it."""
    try:
        return as_path(path), f"{name} = {os.fspath(path)!r}" if name else os.fspath(path)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None


def _check_above(target: Path, label: str) -> None:
    for above in target.absolute().parents:
        kind = kind_of(above)
        if kind == "nothing":
            continue
        if kind != "a folder":
            raise UserError(f"{label}: lies below {above}, which is {kind or 'a file'}")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"{label}: there is no permission to write into {above}")
        return


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_all(path: Path) -> None:
    """Give a file that only its owner may read the usual permissions."""
    current = os.umask(0)
    os.umask(current)
    path.chmod(0o666 & ~current)


def remove_tree(path: Path) -> None:
    """Remove a folder with all its content, if it exists."""
    if is_remote(path):
        cast(epath.Path, path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def copy_files(source: Path, target: Path, last: str) -> None:
    """Copy the files of a folder; the file named `last` is copied last."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        if file.is_file():
            with file.open("rb") as content, (target / file.name).open("wb") as copy:
                shutil.copyfileobj(content, copy, 1 << 24)


@functools.cache
def local_folder(folder: str) -> Path:
    """A folder on the disk: the folder itself, or a copy that is removed when the process ends."""
    if not is_remote(folder):
        return as_path(folder)
    copy = Path(tempfile.mkdtemp(prefix="atlas-jax-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    if as_path(folder).is_dir():
        copy_files(as_path(folder), copy, "")
    return copy
