"""A lock file for one process at a time; the operating system frees it when the process ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from atlas_jax.core.errors import UserError


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, then remove it.

    On a file system without locks this does nothing.

    Raises:
      UserError: another process holds the lock; names `what` and that process.
      OSError: the file cannot be made.
    """
    handle = _acquire(path, what)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _acquire(path: Path, what: str) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            raise UserError(
                f"{what} is being written by another process ({holder or 'just begun'}); wait for "
                "it to end, then start this command again"
            ) from None
        except OSError:  # the file system has no locks
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        if _is_at(handle, path):
            with contextlib.suppress(OSError):  # a full disk; the number is only told
                os.truncate(handle, 0)
                os.write(handle, str(os.getpid()).encode("ascii"))
            return handle
        os.close(handle)  # its last holder has just removed the file


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
