"""Put text into a format; only the format can add special tokens, never the user's text.

A question may contain `<extra_id_0>` and a passage `[SEP]`. In a tokenizer's vocabulary these are
names of special tokens. So two marks go with the text to `Tokenizer.encode`, which removes them.
They are noncharacters of Unicode, which no text may contain:

    LITERAL     in `<` LITERAL `extra_id_0>`: text that only looks like a sentinel
    DELIBERATE  before `[SEP]`: the token itself, because a format says so

An unmarked sentinel is a sentinel, since formats and tasks write them. The name of any other
special token is plain text unless it is marked.
"""

import functools
import re
import string
from collections.abc import Sequence
from typing import Any

from atlas_jax.core.errors import UserError

LITERAL = "\ufdd0"
DELIBERATE = "\ufdd1"

SENTINEL = re.compile(r"<extra_id_\d+>")
_SENTINEL_TEXT = re.compile(r"<(?=extra_id_\d+>)")
# The form of special tokens in T5, BERT and similar models.
_SPECIAL_NAME = re.compile(r"(?!<extra_id_\d+>)(<[^<>\s]+>|\[[^\[\]\s]+\])")


class Filled(str):
    """Text made by a format; when put into another format it keeps its special tokens."""

    __slots__ = ()


def literal(text: str) -> Filled:
    """Mark a user's text so that it contains no special token."""
    if isinstance(text, Filled):
        return text
    plain = text.replace(LITERAL, "").replace(DELIBERATE, "")
    return Filled(_SENTINEL_TEXT.sub(f"<{LITERAL}", plain) if "<extra_id_" in plain else plain)


def deliberate(text: str) -> Filled:
    """Mark the special tokens that a format's own text has as the tokens themselves."""
    return Filled(_SPECIAL_NAME.sub(rf"{DELIBERATE}\1", text))


def fill(template: str, /, **fields: Any) -> Filled:
    """`template.format(**fields)`; special tokens only count in the template, not in fields.

    Args:
      template: already checked to have only these fields.
      fields: a `Filled` is used as it is, any other value as text.
    """
    parts = []
    for before, name in _pieces(template):
        parts.append(before)
        if name is not None:
            value = fields[name]
            parts.append(value if isinstance(value, Filled) else literal(str(value)))
    return Filled("".join(parts))


def check_format(binding: str, template: str, fields: Sequence[str]) -> tuple[str, ...]:
    """Refuse a format string that is malformed, has other fields, or formats a field.

    Returns:
      The fields that it has.

    Raises:
      UserError: names the gin binding and the fields there are.
    """
    known = ", ".join(f"{{{field}}}" for field in fields)
    try:
        used = [piece[1:] for piece in string.Formatter().parse(template) if piece[1] is not None]
    except ValueError as error:
        raise UserError(f"{binding} = {template!r}: {error}; fields are {known}") from None
    for name, width, conversion in used:
        if name not in fields:
            raise UserError(f"{binding} = {template!r}: no field {{{name}}}; there is {known}")
        if width or conversion:
            extra = f"!{conversion}" if conversion else f":{width}"
            raise UserError(
                f"{binding} = {template!r}: a field stands as it is, without {extra!r}; write "
                f"{{{name}}}"
            )
    return tuple(str(name) for name, _, _ in used)


@functools.lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """The text before each field, with special tokens marked, and the field's name."""
    return tuple(
        (deliberate(before), name) for before, name, _, _ in string.Formatter().parse(template)
    )


def unmarked(text: str) -> str:
    """The text as a person reads it."""
    return text.replace(LITERAL, "").replace(DELIBERATE, "")
