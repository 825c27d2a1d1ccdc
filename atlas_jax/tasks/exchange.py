"""Exchange values in a part of a passage, so that only reading leads to the answer."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from atlas_jax.tasks.asking import Pattern
from atlas_jax.tasks.fact_corpus import FactCorpus, FactPassage, random_words
from atlas_jax.tasks.facts import Fact

_WORD_CHARACTERS = 6.5  # mean length of a word with its blank


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """`text[left:right]` of a passage, and the facts in it from left to right."""

    left: int
    right: int
    facts: tuple[Fact, ...]


def window_of(
    source: FactPassage, asked: Fact, words: int, rng: np.random.Generator, pattern: Pattern | None
) -> Window:
    """A window of about `words` words that holds the asked fact; 0 = the whole text.

    It begins after a value and ends with a value; punctuation after the first one is left out. It
    contains the text in which a pattern's answer is searched.
    """
    text, facts = source.text, source.facts
    if words == 0:
        return Window(0, len(text), facts)

    def left_of(number: int) -> int:
        return facts[number - 1].end if number else 0

    first = last = facts.index(asked)
    while True:
        options = [n for n in (first - 1, last + 1) if 0 <= n < len(facts)]
        if not options:
            break
        n = options[int(rng.integers(len(options)))]
        low, high = min(n, first), max(n, last)
        if facts[high].end - left_of(low) > words * _WORD_CHARACTERS:
            break
        first, last = low, high
    left, right = left_of(first), facts[last].end
    while left < facts[first].start and not text[left].isalpha():
        left += 1  # punctuation and numbers of a remark
    if pattern and pattern.from_list:
        right = max(right, asked.stop)
    return Window(left, right, facts[first : last + 1])


def exchanged(
    text: str,
    window: Window,
    asked: Fact,
    corpus: FactCorpus,
    share: float,
    rng: np.random.Generator,
    pattern: Pattern | None = None,
) -> tuple[str, Fact, tuple[Fact, ...]]:
    """Exchange a share of the window's values; returns the text, the asked fact and all facts.

    The new value of the asked fact has the form that the pattern asks for.
    """
    new: list[str] = []
    for fact in window.facts:
        value = _new_value(corpus, fact, share, rng)
        if pattern and fact == asked:
            value = _fitting(value, fact, text, pattern)
        elif pattern and pattern.from_list and asked.start < fact.start < asked.stop:
            value = None  # stays as it is in the answer
        new.append(fact.value(text) if value is None else value)
    pieces, at = [], window.left
    for fact, value in zip(window.facts, new, strict=True):
        pieces += [text[at : fact.start], value]
        at = fact.end
    pieces.append(text[at : window.right])
    facts = _moved(window, new)
    return "".join(pieces), facts[window.facts.index(asked)], facts


def _new_value(
    corpus: FactCorpus, fact: Fact, share: float, rng: np.random.Generator
) -> str | None:
    if rng.random() >= share:
        return None
    if rng.random() < 0.5:
        facts = corpus.facts(fact.label)
        other, text = facts[int(rng.integers(len(facts)))]
        return other.value(text)
    return random_words(corpus, rng)


def _fitting(value: str | None, fact: Fact, text: str, pattern: Pattern) -> str | None:
    """A new value for the asked fact; None if it would not contain an answer to the pattern."""
    if value is None:
        return None
    whole = value + text[fact.end : fact.stop]
    made = Fact(fact.label, 0, len(value), len(whole))
    return value if pattern.answer(made, whole) else None


def _moved(window: Window, new: Sequence[str]) -> tuple[Fact, ...]:
    """The window's facts at their places among the new values."""
    grown = [len(value) - (f.end - f.start) for f, value in zip(window.facts, new, strict=True)]

    def place(at: int) -> int:
        before = (n for fact, n in zip(window.facts, grown, strict=True) if fact.end <= at)
        return min(at, window.right) - window.left + sum(before)

    return tuple(
        Fact(fact.label, place(fact.start), place(fact.end), place(max(fact.end, fact.stop)))
        for fact in window.facts
    )
