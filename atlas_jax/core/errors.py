"""The one base class of every error that a user's input can cause, and helps to word one."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: a file, field, flag or gin binding that is wrong.

    The message names what is at fault and what would be right, so the launcher
    prints it alone, without a traceback, and exits with code 2.
    """


def one_line(error: BaseException | str) -> str:
    """An error's text on one line, for another error to quote; never empty.

    Of a long one the middle is left out: what happened may stand behind the paths it names.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 250 else f"{text[:100]} ... {text[-145:]}"


def no_value_for(fields: Iterable[str]) -> str:
    """What is said of fields, as ``Class.name``, that nothing gives a value."""
    names = list(fields)
    return f"no value for {', '.join(names)}; give {' '.join(f'--gin.{n}=...' for n in names)}"


def printable(text: str) -> str:
    """A message with whatever would move a terminal's cursor spelt out, on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a library written in Rust, which is no subclass of Exception."""
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
    """Refuse a value.

    Raises:
      UserError: names the binding, its value and what is expected.
    """
    if not condition:
        raise UserError(f"{binding} = {value!r}: expected {expected}")


def one_of(choices: tuple[str, ...]) -> str:
    """What a message says is right: one of these texts."""
    return f"one of {', '.join(map(repr, choices))}"
