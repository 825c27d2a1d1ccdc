"""Passages of about 100 words out of a country's fields."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from atlas_jax.demo.factbook_text import PROSE_SECTION, Entity, Field

MAX_WORDS = 120
EDITION, EDITION_2015 = "fb2026", "fb2015"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"“'A-Z])")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|St|Mt|Dr|Mr|Mrs|Gen|Lt|No|ca|est|U\.S|B\.C|A\.D))\.$")


@dataclass(frozen=True)
class Passage:
    """One passage and the (section, field) pairs that it renders."""

    id: str
    title: str
    section: str
    text: str
    sources: tuple[tuple[str, str], ...]

    def row(self) -> dict[str, str]:
        """Return the passage as it is written to the passages file."""
        return {"id": self.id, "title": self.title, "section": self.section, "text": self.text}


def count_words(text: str) -> int:
    """Return the number of blank-separated words."""
    return len(text.split())


def _clauses(text: str) -> list[str]:
    """Split at semicolons outside brackets; each clause keeps its semicolon."""
    clauses, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([":
            depth += 1
        elif character in ")]":
            depth = max(depth - 1, 0)
        elif character == ";" and depth == 0 and text[position + 1 : position + 2] == " ":
            clauses.append(text[start : position + 1])
            start = position + 2
    return [*clauses, text[start:]]


def _sentences(text: str) -> list[str]:
    """Split prose at sentence ends, not after initials and common abbreviations."""
    sentences: list[str] = []
    for piece in _SENTENCE_END.split(text):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += " " + piece
        else:
            sentences.append(piece)
    return sentences


def _fine_pieces(text: str, prose: bool) -> Iterator[str]:
    """Yield pieces of at most MAX_WORDS words, cut where the text allows it."""
    for piece in _sentences(text) if prose else _clauses(text):
        if count_words(piece) <= MAX_WORDS:
            yield piece
            continue
        cuts = _clauses(piece) if prose else _sentences(piece)
        if len(cuts) == 1:
            cuts = re.split(r"(?<=,) ", piece)
        for cut in cuts:
            words = cut.split()
            for start in range(0, len(words), MAX_WORDS):
                yield " ".join(words[start : start + MAX_WORDS])


def split_long(text: str, prose: bool = False) -> list[str]:
    """Split a text into the fewest parts of about MAX_WORDS words, of about equal length."""
    total = count_words(text)
    if total <= MAX_WORDS:
        return [text]
    target = total / -(-total // MAX_WORDS)
    parts: list[str] = []
    current: list[str] = []
    length = 0
    for piece in _fine_pieces(text, prose):
        words = count_words(piece)
        if current and (length + words / 2 > target or length + words > MAX_WORDS):
            parts.append(" ".join(current))
            current, length = [], 0
        current.append(piece)
        length += words
    parts.append(" ".join(current))
    return parts


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ";")) else text + "."


def render(field: Field) -> list[str]:
    """Return a field's text as one or more pieces, `Field: subfield: value; ...`."""
    if field.section == PROSE_SECTION:
        return [_sentence(part) for part in split_long(field.body(), prose=True)]
    first, *rest = split_long(field.body())
    return [
        _sentence(f"{field.name}: {first}"),
        *(_sentence(f"{field.name} (continued): {part}") for part in rest),
    ]


def passages_of(entity: Entity, edition: str = EDITION) -> list[Passage]:
    """Return a country's passages; their ids begin with the edition.

    Fields of more than MAX_WORDS words are split and stand alone; neighbouring shorter fields of
    one section are joined as long as they stay within MAX_WORDS.
    """
    groups: list[tuple[str, list[str], list[str]]] = []  # section, field names, texts
    room = 0
    for field in entity.fields:
        pieces = render(field)
        words = count_words(pieces[0])
        fits = groups and groups[-1][0] == field.section and words <= room
        if len(pieces) == 1 and fits:
            groups[-1][1].append(field.name)
            groups[-1][2].append(pieces[0])
            room -= words
        else:
            groups.extend((field.section, [field.name], [piece]) for piece in pieces)
            room = MAX_WORDS - words if len(pieces) == 1 else 0
    return [
        Passage(
            id=f"{edition}-{entity.code}-{number:03d}",
            title=entity.title,
            section=f"{section}: {', '.join(names)}",
            text=" ".join(texts),
            sources=tuple((section, name) for name in names),
        )
        for number, (section, names, texts) in enumerate(groups)
    ]
