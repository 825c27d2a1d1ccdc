"""What lies around a command: its streams, whoever reads them, and the home folder in paths."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from atlas_jax.core.errors import UserError, one_line

PIPE_CLOSED = 141  # as of a program that SIGPIPE ends
FAILED = 2

# `~`, `~/x`, `~name/x`, as a shell leaves them behind an equals sign or in quotes.
_HOME = re.compile(r"~[\w.-]*(?=$|/)")


def expand_home(value: Any, where: str) -> Any:
    """`~` and `~name` at the beginning of a text, or of the texts of a list, as home folders.

    Raises:
      UserError: nobody is called so; begins with `where`.
    """
    if isinstance(value, tuple | list):
        return type(value)(expand_home(item, where) for item in value)
    if not isinstance(value, str) or not _HOME.match(value):
        return value
    expanded = os.path.expanduser(value)
    if expanded.startswith("~") and "/" in value:
        raise UserError(f"{where}: {value!r}: there is no home folder {value.partition('/')[0]}")
    return expanded


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with home folders for `~`; gin bindings are expanded when read.

    Raises:
      UserError: nobody is called so.
    """
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--gin."):
            expanded.append(argument)
        elif argument.startswith("--") and equals:
            paths = [expand_home(part, flag) for part in value.split(",")]
            expanded.append(f"{flag}={','.join(paths)}")
        else:
            expanded.append(expand_home(argument, "argument"))
    return expanded


def prepare_streams() -> None:
    """Let stdout show each line at once, and no stream fail at a character that it cannot show.

    A terminal or pipe that is not UTF-8 gets `\\u8c01` for what it lacks, and a byte that cannot be
    read becomes the replacement character.
    """
    for stream, settings in (
        (sys.stdout, {"line_buffering": True, "errors": "backslashreplace"}),
        (sys.stderr, {"errors": "backslashreplace"}),
        (sys.stdin, {"errors": "replace"}),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(**settings)


def guarded(program: str, run: Callable[[], int]) -> int:
    """The exit code of `run`, and what a failing stream makes of it.

    A reader that has enough (`| head`) ends the command in silence with code 141; any other error
    of the operating system with code 2 and one line.
    """
    try:
        prepare_streams()
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _silence()
        return PIPE_CLOSED
    except OSError as error:
        if error.errno is None:
            raise
        _silence(stderr=False)
        print(f"{program}: error: {told(error)}", file=sys.stderr)
        return FAILED


def told(error: OSError, text: str = "") -> str:
    """An error of the operating system in one line; `text` is what it says, where that is known."""
    hint = "; make room and start the same command again" if error.errno == errno.ENOSPC else ""
    return f"{one_line(OSError(text or str(error)))}{hint}"


def _silence(stderr: bool = True) -> None:
    """Let nothing more be written to streams that fail, not even when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr) if stderr else (sys.stdout,):
        try:
            os.dup2(nowhere, stream.fileno())
        except (AttributeError, OSError, ValueError):  # no file behind it
            continue
    os.close(nowhere)
