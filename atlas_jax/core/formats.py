"""Text put into a format: what a user typed stays text, only the format brings special tokens.

A question may hold `<extra_id_0>`, a passage `[SEP]`. In a tokenizer's vocabulary these are names
of tokens with a meaning. So two marks (noncharacters of Unicode, which no text may hold) travel
with the text to `Tokenizer.encode`, which takes them out:

    LITERAL     in `<` LITERAL `extra_id_0>`: text that only looks like a sentinel
    DELIBERATE  before `[SEP]`: the token itself, because a format says so

A sentinel without a mark is one, since formats and tasks write them. Every other name of a special
token is text unless it is marked.
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
# What special tokens of T5, BERT and their kin look like.
_SPECIAL_NAME = re.compile(r"(?!<extra_id_\d+>)(<[^<>\s]+>|\[[^\[\]\s]+\])")


class Filled(str):
    """Text that came out of a format: put into another one, it keeps its special tokens."""

    __slots__ = ()


def literal(text: str) -> Filled:
    """What a user typed, as text that holds no special token."""
    if isinstance(text, Filled):
        return text
    plain = text.replace(LITERAL, "").replace(DELIBERATE, "")
    return Filled(_SENTINEL_TEXT.sub(f"<{LITERAL}", plain) if "<extra_id_" in plain else plain)


def fill(template: str, /, **fields: Any) -> Filled:
    """`template.format(**fields)`; special tokens of the template count, those of fields do not.

    Args:
      template: checked before to have only these fields.
      fields: a `Filled` is put in as it is, any other value as text.
    """
    parts = []
    for before, name in _pieces(template):
        parts.append(before)
        if name is not None:
            value = fields[name]
            parts.append(value if isinstance(value, Filled) else literal(str(value)))
    return Filled("".join(parts))


def check_format(binding: str, template: str, fields: Sequence[str]) -> tuple[str, ...]:
    """Refuse a format string that is malformed or has other than the given fields, as they are.

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
    """What stands before each field, its special tokens marked, and the field's name."""
    return tuple(
        (_SPECIAL_NAME.sub(rf"{DELIBERATE}\1", before), name)
        for before, name, _, _ in string.Formatter().parse(template)
    )


def unmarked(text: str) -> str:
    """The text as a person reads it."""
    return text.replace(LITERAL, "").replace(DELIBERATE, "")
