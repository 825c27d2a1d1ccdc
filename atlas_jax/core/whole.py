"""Files and folders that appear whole or not at all."""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from atlas_jax.core.errors import UserError
from atlas_jax.core.locks import locked
from atlas_jax.core.paths import check_output_file, check_output_folder, is_remote, open_to_all

_LAST = "manifest.json"  # with it a folder is whole
_IGNORED = {"lost+found"}  # of the root of a disk


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing bytes; it replaces `path` when the block ends well.

    The bytes go to a temporary name in the same folder. At the end they are flushed to the disk
    and the file is renamed; if the block raises, the file is removed. A bucket gets one write.

    Raises:
      UserError: `path` is a folder, a device, a pipe or a socket, or lies below a file.
    """
    target = check_output_file(path)
    if is_remote(path):
        content = io.BytesIO()
        yield content
        target.write_bytes(content.getvalue())
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as raw:
            yield cast(BinaryIO, raw)
            raw.flush()
            os.fsync(raw.fileno())
        open_to_all(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """A temporary folder whose files are at `directory` when the block ends well.

    It lies beside its target as ``.NAME.partial`` and is renamed at the end. In an empty folder
    that is there already (a mount point, ``.``, behind a link) it lies inside, and its files are
    moved up, the manifest last. An error removes it. A kill leaves it; the next attempt removes it
    first. Only one process at a time makes a directory.

    Args:
      replace: what is at `directory` gives way at the end. Without it, nothing may be there.

    Raises:
      UserError: something is at `directory` already, another process is making it, or it could
        not be written (a full disk, no permission).
    """
    target = Path(os.path.realpath(check_output_folder(directory)))
    name = target.name or "root"
    inside = target.is_dir() and not replace
    place = target if inside else target.parent
    partial, old, lock = (place / f".{name}.{end}" for end in ("partial", "old", "lock"))
    own = {partial.name, lock.name, *_IGNORED}
    taken = target.exists() and not replace
    if taken and not (inside and all(one.name in own for one in target.iterdir())):
        raise UserError(f"{directory} exists already; remove it or choose another directory")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(lock, str(directory)):
            if old.exists() and not target.exists():  # a kill between the two renames below
                old.rename(target)
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                _take_place(partial, target, old, inside)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise unwritten(directory, error) from error


def _take_place(partial: Path, target: Path, old: Path, inside: bool) -> None:
    if inside:
        for file in sorted(partial.iterdir(), key=lambda file: file.name == _LAST):
            file.rename(target / file.name)
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)


def unwritten(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The error for a file or folder that could not be written."""
    return UserError(f"{path} could not be written, nothing of it was kept: {error}")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
