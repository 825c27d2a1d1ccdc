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
from typing import Any

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
