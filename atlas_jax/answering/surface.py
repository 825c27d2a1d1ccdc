"""Restores an answer's spelling for tokenizers that lose case, accents and blanks.

BERT's uncased WordPiece can only guess that `174 , 370 , 536` was `174,370,536`. But an answer that
was copied from a passage can be spelt as it is there.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

_PIECES = re.compile(r"\w+|[^\w\s]")
_INSIDE = "##"  # WordPiece decodes a first piece so that stands within a word
_IN_NUMBER = re.compile(r"(?<=\d) ?([.,:]) ?(?=\d)")


def as_written(answer: str, texts: Iterable[str]) -> str:
    """The first part of the texts with the answer's letters, digits and signs.

    Case, accents and blanks do not count. The part begins and ends with whole words and numbers.
    Where there is no such part, an answer that stops within a word is written to the word's end,
    one that begins within a word from the word's beginning, and a part of a number becomes the
    whole number: word pieces may be copied incompletely.

    Args:
      answer: decoded text.
      texts: texts that the answer may be copied from, the likeliest first.

    Returns:
      This part of the text; if there is none, the answer without blanks inside its numbers.
    """
    inside = answer.startswith(_INSIDE)
    answer = answer.removeprefix(_INSIDE)
    pieces = _PIECES.findall(_plain(answer)[0])
    if not pieces:
        return answer
    texts = list(texts)
    for pattern in _patterns(pieces, inside):
        for text in texts:
            plain, places = _plain(text)
            found = pattern.search(plain)
            if found:
                return text[places[found.start()] : places[found.end() - 1] + 1]
    return _IN_NUMBER.sub(r"\1", answer)


def _patterns(pieces: Sequence[str], inside: bool) -> Iterator[re.Pattern[str]]:
    """What to search for, the stricter pattern first; `inside`: it begins within a word."""
    before, lead, after, rest = r"(?<!\w)", "", r"(?!\w)", r"\w*"
    if pieces[0][0].isdigit():
        before, lead = before + r"(?<!\d[.,])", r"(?:\d+[.,])*"
    if pieces[-1][-1].isdigit():
        after, rest = after + r"(?![.,]\d)", r"\w*(?:[.,]\d+)*"
    if inside:
        lead = r"\w+"
    middle = r"\s*".join(map(re.escape, pieces))
    yield re.compile(before + (lead if inside else "") + middle + after)
    yield re.compile(before + lead + middle + rest)


@functools.lru_cache(64)  # a text is searched for two patterns, and often for several answers
def _plain(text: str) -> tuple[str, list[int]]:
    """The text in small letters without accents, and the place of each letter in the text."""
    letters, places = [], []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFD", character.lower()):
            if unicodedata.category(part) != "Mn":
                letters.append(part)
                places.append(place)
    return "".join(letters), places
