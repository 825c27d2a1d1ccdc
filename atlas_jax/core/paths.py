"""Files of a disk and objects of a bucket (gs://bucket/name) by one interface.

An object of a bucket appears whole or not at all, so where a disk needs a temporary name and a
rename, a bucket needs one write.
"""

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import cast

import fsspec
from etils import epath

from atlas_jax.core.errors import UserError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path to work with, wherever it lies: `pathlib`'s, or one of a bucket that acts like it.

    Raises:
      UserError: the package for this kind of bucket is missing.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    try:
        fsspec.get_filesystem_class("gcs" if text.startswith("gs://") else text.split(":")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"{text}: {error}; gs:// needs the extra [tpu], which has gcsfs") from error
    return cast(Path, epath.Path(text))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_all(path: Path) -> None:
    """Give a file that was made for its owner alone the permissions that others have."""
    current = os.umask(0)
    os.umask(current)
    path.chmod(0o666 & ~current)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that it holds, if it is there."""
    if is_remote(path):
        cast(epath.Path, path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def copy_files(source: Path, target: Path, last: str) -> None:
    """Copy the files of a folder, the one that is called `last` after all others."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        if file.is_file():
            with file.open("rb") as content, (target / file.name).open("wb") as copy:
                shutil.copyfileobj(content, copy, 1 << 24)


@functools.cache
def local_folder(folder: str) -> Path:
    """A folder of files on the disk: itself, or a copy that lives as long as this process."""
    if not is_remote(folder):
        return Path(folder)
    copy = Path(tempfile.mkdtemp(prefix="atlas-jax-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    if as_path(folder).is_dir():
        copy_files(as_path(folder), copy, "")
    return copy
