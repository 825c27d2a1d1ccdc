"""The surroundings of a command: its streams and their readers, and `~` in paths."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from atlas_jax.core.errors import UserError, one_line

PIPE_CLOSED = 141  # exit code of a program that SIGPIPE ends
FAILED = 2

# `~`, `~/x`, `~name/x`, as a shell leaves them behind an equals sign or in quotes.
_HOME = re.compile(r"~[\w.-]*(?=$|/)")


def expand_home(value: Any, where: str) -> Any:
    """Replace `~` and `~name` at the beginning of a text, or of texts in a list, by home folders.

    Raises:
      UserError: there is no such user; begins with `where`.
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
    """Replace `~` in command-line arguments by home folders; in gin bindings this happens later.

    Raises:
      UserError: there is no such user.
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
    """Let stdout show each line at once, and let no stream fail at a character it cannot show.

    A terminal or pipe that is not UTF-8 gets `\\u8c01` for a character that it lacks. A byte that
    cannot be read becomes the replacement character.
    """
    for stream, settings in (
        (sys.stdout, {"line_buffering": True, "errors": "backslashreplace"}),
        (sys.stderr, {"errors": "backslashreplace"}),
        (sys.stdin, {"errors": "replace"}),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(**settings)


def guarded(program: str, run: Callable[[], int]) -> int:
    """The exit code of `run`, also if a stream fails.

    If the reader of stdout closes it (`| head`), the command ends without a message and with code
    141. Any other error of the operating system gives code 2 and one line.
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
    """An error of the operating system in one line; `text` is its message, if it is known."""
    hint = "; make room and start the same command again" if error.errno == errno.ENOSPC else ""
    return f"{one_line(OSError(text or str(error)))}{hint}"


def _silence(stderr: bool = True) -> None:
    """Stop all writing to streams that fail, also when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr) if stderr else (sys.stdout,):
        try:
            os.dup2(nowhere, stream.fileno())
        except (AttributeError, OSError, ValueError):  # a stream without a file
            continue
    os.close(nowhere)
