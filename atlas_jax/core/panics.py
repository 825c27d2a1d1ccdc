"""Libraries written in Rust: a panic of theirs as an error, without what it prints."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from atlas_jax.core.errors import UserError, is_panic, one_line


@contextlib.contextmanager
def panics_told(where: str) -> Iterator[None]:
    """Let a panic in this block be a UserError that begins with `where`.

    A panic prints several lines to the process's stderr before Python hears of it; they are
    dropped. Whatever else is printed there meanwhile appears when the block ends.
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
