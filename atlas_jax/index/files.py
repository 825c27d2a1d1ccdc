"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from atlas_jax.core.errors import UserError


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``directory`` when the block ends well.

    It lies beside its target as ``.NAME.partial``. An error removes it; a kill leaves it
    to the next attempt, which begins by removing it.

    Raises:
      UserError: something is at ``directory`` already, or it could not be written (a full
        disk, no permission).
    """
    target = Path(directory).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{directory} exists already; remove it or choose another directory")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise unwritten(directory, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def unwritten(path: str | os.PathLike[str], error: OSError) -> UserError:
    """The error for a file or folder that could not be written."""
    return UserError(f"{path} could not be written, nothing of it was kept: {error}")
