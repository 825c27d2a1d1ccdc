"""Text as it was written, for tokenizers that lose case, accents and blanks.

BERT's uncased WordPiece makes `174,370,536` out of `174 , 370 , 536` only by guessing. An answer
that was copied stands in a passage, so its writing can be taken from there.
"""

import re
import unicodedata
from collections.abc import Iterable

_PIECES = re.compile(r"\w+|[^\w\s]")
_IN_NUMBER = re.compile(r"(?<=\d) ?([.,:]) ?(?=\d)")


def as_written(answer: str, texts: Iterable[str]) -> str:
    """The first stretch of the texts that has the answer's letters, digits and signs.

    Case, accents and blanks do not count; a stretch begins and ends with whole words.

    Args:
      answer: decoded text.
      texts: where it may have been copied from, the likeliest first.

    Returns:
      The stretch as it is written; without any, the answer with its numbers closed up.
    """
    pieces = _PIECES.findall(_plain(answer)[0])
    if not pieces:
        return answer
    pattern = re.compile(r"(?<!\w)" + r"\s*".join(map(re.escape, pieces)) + r"(?!\w)")
    for text in texts:
        plain, places = _plain(text)
        found = pattern.search(plain)
        if found:
            return text[places[found.start()] : places[found.end() - 1] + 1]
    return _IN_NUMBER.sub(r"\1", answer)


def _plain(text: str) -> tuple[str, list[int]]:
    """Small letters without accents, and which character of the text each comes from."""
    letters, places = [], []
    for place, character in enumerate(text):
        for part in unicodedata.normalize("NFD", character.lower()):
            if unicodedata.category(part) != "Mn":
                letters.append(part)
                places.append(place)
    return "".join(letters), places
