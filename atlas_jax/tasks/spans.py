"""Choose the parts of a text to mask: random spans as in T5, or salient ones.

Positions are character offsets; lengths are counted in words (text between blanks).
"""

import array
import dataclasses
import functools
import re
import sys
from bisect import bisect_left, bisect_right

import numpy as np

KINDS = ("value", "number", "entity")

_UPPER = "".join(c for c in map(chr, range(0x2000)) if c.isupper())
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_UNIT = (
    "(?:%|(?:thousand|million|billion|trillion|percent|years?|days?|hours?|sq km|km|cm|mm|m|kg|"
    r"nm|ft|miles?|tons?|bbl)\b)"
)
_WORD = re.compile(r"\S+")
# `Field: subfield: value; ...`: the text after the last ": ", up to ";", a remark in brackets or
# the end of the sentence (a capital before a full stop is an abbreviation). Notes are prose.
_VALUE = re.compile(r"(?<!note): ((?:(?!: )[^;\n])+?)(?=;| \(|(?<![A-Z])\.(?:\s|$)|$)")
# The text before a ": " names a value; it is not one itself.
_LABEL = re.compile(r"(?:^|(?<=[;:.)] ))[^;:.]{1,80}(?=: )")
# Dates first, since their parts are numbers. "(2023 est.)" is not worth asking for.
_NUMBER = re.compile(
    rf"(?<![\w.,])(?:(?:\d{{1,2}} )?{_MONTH}\b(?: \d{{1,2}},)?(?: \d{{3,4}}\b)?"
    rf"|[-−]?[$€£]?\d(?:[\d.,]*\d)?(?![\w.,]*\d)(?: ?{_UNIT})?)(?! est\.)"
)
# A word with a capital, or an initial before one.
_NAME = rf"(?:[{_UPPER}]\.(?= [{_UPPER}])|[{_UPPER}][\w'’&.-]*(?<!\.))"
_ENTITY = re.compile(
    rf"(?<!\w){_NAME}(?: (?:(?:of|the|de|del|la|al|el|bin|von|van) ){{0,2}}{_NAME})*"
)
_BEGINS_SENTENCE = re.compile(r"(?:^|[.!?]['\"”’)]*\s+)$")
_OPENERS = frozenset(
    "A An The In On At By For From To Of And But Or If As It Its He She They We You I This That "
    "These Those There When While After Before Although However Since With Some Many Most Such "
    "His Her Their Our Not No".split()
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A stretch `text[start:end]` of so many words."""

    start: int
    end: int
    words: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where a text's words are, and its salient spans (which may overlap)."""

    word_starts: "array.array[int]"
    word_ends: "array.array[int]"
    salient: tuple[Span, ...]


@functools.lru_cache(maxsize=1 << 16)
def layout(text: str, kinds: tuple[str, ...], max_words: int) -> Layout:
    """Find the words and, of the given kinds, the salient spans of up to `max_words` words.

    * `value`: in text of the form `Field: subfield: value; ... . Next field: value`, what
      follows a colon, up to the semicolon, bracket or full stop;
    * `number`: numbers with their unit or currency, and dates;
    * `entity`: runs of capitalised words, but not the word that begins a sentence.

    Text before a colon is never masked. Results are cached, so each passage is searched once for
    many epochs.
    """
    matches = list(_WORD.finditer(text))
    starts = array.array("i", [match.start() for match in matches])
    ends = array.array("i", [match.end() for match in matches])
    finders = {"value": _values, "number": _numbers, "entity": _entities}
    labels = [match.span() for match in _LABEL.finditer(text)]
    found = {
        where
        for kind in kinds
        for where in finders[kind](text)
        if kind == "value" or not _touches(where, labels)
    }
    spans = (
        Span(a, b, bisect_left(starts, b) - bisect_right(starts, a) + 1) for a, b in sorted(found)
    )
    return Layout(starts, ends, tuple(span for span in spans if span.words <= max_words))


def random_spans(
    num_words: int, density: float, mean_words: float, max_spans: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Word ranges `[first, last)` to mask, as drawn by T5's `random_spans_noise_mask`.

    Kept and masked parts alternate; the first one is kept. The kept words and the masked words are
    each divided at random into as many parts as there are spans [arXiv 1910.10683, section 3.1.4].

    Args:
      num_words: at least 2.
      density: share of the words to mask.
      mean_words: mean length of a span.
      max_spans: no more spans than this.
      rng: random source of the cuts.
    """
    num_masked = min(max(round(num_words * density), 1), num_words - 1)
    num_spans = min(max(round(num_masked / mean_words), 1), num_words - num_masked)
    if num_spans > max_spans:
        num_spans, num_masked = max_spans, min(num_masked, round(max_spans * mean_words))
    masked = _random_parts(num_masked, num_spans, rng)
    kept = _random_parts(num_words - num_masked, num_spans, rng)
    spans, at = [], 0
    for keep, mask in zip(kept, masked, strict=True):
        spans.append((at + keep, at + keep + mask))
        at += keep + mask
    return spans


def salient_spans(
    found: Layout,
    density: float,
    max_spans: int,
    window_words: int,
    rng: np.random.Generator,
) -> tuple[list[Span], tuple[int, int]]:
    """Draw salient spans that do not overlap, close enough to share one window.

    The first span is drawn from all of them; more follow while less than `density` of
    the window's words are masked.

    Args:
      found: of the text; it must have a salient span.
      density: share of the window's words to mask; one span is masked in any case.
      max_spans: no more spans than this.
      window_words: words of the window, 0 = the whole text.
      rng: random source of the choice.

    Returns:
      The spans from left to right, and the window as a word range `[first, last)`.
    """
    order = rng.permutation(len(found.salient)).tolist()
    anchor = found.salient[order[0]]
    first, last = _window_around(anchor, found, window_words, rng)
    left, right = found.word_starts[first], found.word_ends[last - 1]
    budget = round((last - first) * density) - anchor.words
    chosen = [anchor]
    for number in order[1:]:
        if budget <= 0 or len(chosen) == max_spans:
            break
        span = found.salient[number]
        if span.words > budget or span.start < left or span.end > right:
            continue
        if all(span.end <= other.start or span.start >= other.end for other in chosen):
            chosen.append(span)
            budget -= span.words
    return sorted(chosen, key=lambda span: span.start), (first, last)


def _window_around(
    span: Span, found: Layout, words: int, rng: np.random.Generator
) -> tuple[int, int]:
    total = len(found.word_starts)
    if words == 0 or words >= total:
        return 0, total
    begin = bisect_right(found.word_starts, span.start) - 1
    spare = max(words - span.words, 0)
    lowest = max(begin - spare, 0)
    highest = min(begin, total - words)
    first = int(rng.integers(lowest, highest + 1)) if highest > lowest else min(lowest, begin)
    return first, min(first + max(words, span.words), total)


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Divide `total` into this many positive whole numbers; all ways are equally likely."""
    if parts == 1:
        return [total]
    cuts = sorted((rng.permutation(total - 1)[: parts - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _values(text: str) -> list[tuple[int, int]]:
    return [_trimmed(text, *match.span(1)) for match in _VALUE.finditer(text)]


def _numbers(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in _NUMBER.finditer(text)]


def _entities(text: str) -> list[tuple[int, int]]:
    found = []
    for match in _ENTITY.finditer(text):
        start, end = match.span()
        if _BEGINS_SENTENCE.search(text, max(start - 4, 0), start):
            head, blank, _ = match.group().partition(" ")
            if not blank:
                continue
            if head in _OPENERS:
                start += len(head) + 1
        if text[start:end] not in _OPENERS and not text[start].islower():
            found.append((start, end))
    return found


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without blanks and commas at the ends."""
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip(" ,"))
    return start + left, start + max(len(piece.rstrip(" ,.")), left + 1)


def _touches(where: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    at = bisect_right(others, (where[0], sys.maxsize))
    before = at > 0 and others[at - 1][1] > where[0]
    return before or (at < len(others) and others[at][0] < where[1])
