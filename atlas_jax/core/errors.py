"""The base class of all errors in a user's input, and functions that help to word them."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input: a file, field, flag or gin binding that is wrong.

    The message names the fault and says what would be right. So the launcher prints only the
    message, without a traceback, and exits with code 2.
    """


class Interrupted(UserError):
    """Work that goes on where it was when the command is started again: what is done is kept."""


def advised(read: Callable[..., T], advice: str) -> Callable[..., T]:
    """Wrap a function so that its `UserError`s also say what to do: `<fault>; <advice>`.

    An `Interrupted` stays as it is: its place cannot be reached, so it is not known to be at fault.
    """

    def told(*given: Any) -> T:
        try:
            return read(*given)
        except Interrupted:
            raise
        except UserError as error:
            raise UserError(f"{error}; {advice}") from error

    return told


def one_line(error: BaseException | str) -> str:
    """An error's text on one line, for use in another message; never empty.

    A long text loses its middle: the cause may follow after long paths.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 250 else f"{text[:100]} ... {text[-145:]}"


def no_value_for(fields: Iterable[str]) -> str:
    """The message about fields, as ``Class.name``, that have no value."""
    names = list(fields)
    return f"no value for {', '.join(names)}; give {' '.join(f'--gin.{n}=...' for n in names)}"


def printable(text: str) -> str:
    """A message on one line, with characters escaped that would move a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic of a Rust library, which is not a subclass of Exception."""
    return type(error).__name__ == "PanicException"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` for the most similar candidate, else the list of candidates."""
    names = sorted(set(candidates))
    if not names:
        return ""
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {by_lower[close[0]]}?"
    return f"; there are: {', '.join(names)}"


def require(condition: bool, binding: str, value: object, expected: str) -> None:
    """Raise the error about a value.

    Raises:
      UserError: names the binding, its value and what is expected.
    """
    if not condition:
        raise UserError(f"{binding} = {value!r}: expected {expected}")


def one_of(choices: tuple[str, ...]) -> str:
    """The part of a message that lists the texts allowed."""
    return f"one of {', '.join(map(repr, choices))}"
