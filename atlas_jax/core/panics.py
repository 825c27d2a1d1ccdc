"""Turns a panic of a Rust library into an error, without what the panic prints."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from atlas_jax.core.errors import UserError, is_panic, one_line


@contextlib.contextmanager
def panics_told(where: str) -> Iterator[None]:
    """Turn a panic in this block into a UserError that begins with `where`.

    A panic prints several lines to the process's stderr before Python knows of it; they are
    dropped. Other output to stderr appears when the block ends.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        panic: BaseException | None = None
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            panic = error
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            if panic is None:
                printed.seek(0)
                os.write(2, printed.read())
    if panic is not None:
        raise UserError(f"{where}: the library breaks down on it: {one_line(panic)}") from None
