"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.locks import locked
from atlas_jax.core.paths import check_output_folder, input_file

_LAST = "manifest.json"  # with it a folder is whole
_IGNORED = {"lost+found"}  # of the root of a disk


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files are at ``directory`` when the block ends well.

    It lies beside its target as ``.NAME.partial`` and is renamed at the end. In an empty folder
    that is there already (a mount point, ``.``, behind a link) it lies inside, and its files are
    moved up, the manifest last. An error removes it; a kill leaves it to the next attempt, which
    begins by removing it. Only one process at a time makes a directory.

    Raises:
      UserError: something is at ``directory`` already, another process is making it, or it could
        not be written (a full disk, no permission).
    """
    target = Path(os.path.realpath(check_output_folder(directory)))
    name = target.name or "root"
    inside = target.is_dir()
    place = target if inside else target.parent
    partial, lock = place / f".{name}.partial", place / f".{name}.lock"
    own = {partial.name, lock.name, *_IGNORED}
    if target.exists() and not (inside and all(one.name in own for one in target.iterdir())):
        raise UserError(f"{directory} exists already; remove it or choose another directory")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(lock, str(directory)):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                _move(partial, target, inside)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise unwritten(directory, error) from error


def _move(partial: Path, target: Path, inside: bool) -> None:
    if not inside:
        partial.rename(target)
        return
    for file in sorted(partial.iterdir(), key=lambda file: file.name == _LAST):
        file.rename(target / file.name)


def create_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> np.memmap:
    """A new .npy file to be filled through memory, its place on the disk reserved.

    Without the reservation a disk that fills up kills the process with a bus error.

    Raises:
      OSError: the disk has no room for it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def open_npy(
    path: Path, shape: tuple[int, ...], *dtypes: type, mode: Literal["r", "r+"] = "r"
) -> np.memmap:
    """Map a .npy file of which is known what it holds: this shape, and one of these types.

    Raises:
      UserError: the file is absent, damaged, or of another shape, type or byte order; says which.
    """
    input_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except Exception as error:  # NumPy evaluates the header, and maps what it says
        raise UserError(f"{path}: not a whole .npy file: {one_line(error)}") from error
    kinds = [np.dtype(one) for one in dtypes]
    if array.shape != shape or array.dtype not in kinds or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " column by column"
        wanted = " or ".join(kind.str for kind in kinds)
        raise UserError(
            f"{path}: holds {array.dtype.str} {list(array.shape)}{order} instead of {wanted} "
            f"{list(shape)}"
        )
    return array


def unwritten(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The error for a file or folder that could not be written."""
    return UserError(f"{path} could not be written, nothing of it was kept: {error}")
