"""All passages with facts of a file, to draw titles, words and values from.

The cloze task exchanges values and titles for others of its file, and puts other passages beside
the asked one. Both come from here. The texts stay in the file: in memory are the places of what can
be drawn, and a passage is read anew when something of it is drawn.
"""

import array
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from atlas_jax.core.unique import hash_id
from atlas_jax.tasks.base import Record
from atlas_jax.tasks.facts import Fact, askable, find_facts

T = TypeVar("T")

_SHARE = 7  # one word in seven is enough to draw from


@dataclasses.dataclass(frozen=True, slots=True)
class FactPassage:
    """A passage, the facts to ask for, and the labels of all of its facts in their order."""

    passage: Record
    facts: tuple[Fact, ...]
    labels: tuple[str, ...]

    @property
    def title(self) -> str:
        """Of the passage, as the file has it."""
        title: str = self.passage.fields["title"]
        return title

    @property
    def text(self) -> str:
        """Of the passage, as the file has it."""
        text: str = self.passage.fields["text"]
        return text


def make_fact_passage(passage: Record, max_words: int) -> FactPassage:
    """The facts of a passage; those to ask for have at most `max_words` words."""
    text = passage.fields["text"]
    facts = find_facts(text)
    return FactPassage(passage, askable(facts, text, max_words), tuple(f.label for f in facts))


class Drawn(Sequence[T]):
    """A sequence of which each item is read from the file when it is asked for."""

    def __init__(self, size: int, read: Callable[[int], T]) -> None:
        """`read(i)` gives item i of `size`."""
        self._size, self._read = size, read

    def __len__(self) -> int:
        """Number of items."""
        return self._size

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...

    def __getitem__(self, at: Any) -> Any:
        """Read an item; of a slice a list."""
        if isinstance(at, slice):
            return [self[one] for one in range(self._size)[at]]
        return self._read(range(self._size)[at])


class FactCorpus:
    """Shared by the records of one file, to draw exchanged values and distractors from.

    Of a passage the memory holds 32 bytes, 12 for each fact, and 8 for each word that no earlier
    passage has.

    Attributes:
      sources: all passages with facts, in the order of the file.
      titles: each once.
      words: some of the words of the texts, as often as they occur.
      small_words: those of `words` in small letters, without digits and signs.
      vocabulary: the words of all texts without digits and signs, each once.
    """

    sources: Sequence[FactPassage]
    titles: Sequence[str]
    words: Sequence[str]
    small_words: Sequence[str]
    vocabulary: Sequence[str]

    def __init__(self, records: Sequence[Record], max_words: int) -> None:
        """Read all records once and note the places of their titles, words and facts.

        Args:
          records: passages that have facts to ask for.
          max_words: most words of these facts, see `make_fact_passage`.
        """
        self.sources = Drawn(len(records), lambda row: make_fact_passage(records[row], max_words))
        titles, labels, rows_f = array.array("Q"), array.array("Q"), array.array("i")
        words, small = array.array("q"), array.array("q")
        known, seen_in, seen_at = set[str](), array.array("i"), array.array("i")
        for row, source in enumerate(self.sources):
            titles.append(hash_id(source.title))
            for fact in source.facts:
                labels.append(hash_id(fact.label))
                rows_f.append(row)
            for place, word in enumerate(source.text.split()):
                if word.isalpha() and word not in known:
                    known.add(word)
                    seen_in.append(row)
                    seen_at.append(place)
            words.append(len(_words(source)))
            small.append(len(_small_words(source)))
        self._titles = _Alike(titles, np.arange(len(records), dtype=np.int32))
        self._labels = _Alike(labels, np.asarray(rows_f, np.int32))
        _, first = np.unique(np.asarray(titles, np.uint64), return_index=True)
        first_n = np.sort(first).astype(np.int32)
        self.titles = Drawn(len(first_n), lambda at: self.sources[first_n[at]].title)
        self.words = self._pieces(words, _words)
        self.small_words = self._pieces(small, _small_words) or self.words
        self.vocabulary = (
            Drawn(len(seen_in), lambda at: self.sources[seen_in[at]].text.split()[seen_at[at]])
            or self.words
        )

    def of_title(self, title: str) -> np.ndarray:
        """Places in `sources`, int32, of the passages with this title."""
        return self._titles.rows(hash_id(title))

    def of_label(self, label: str) -> np.ndarray:
        """Places in `sources`, int32, of the facts to ask for with this label, in their order."""
        return self._labels.rows(hash_id(label))

    def has_title(self, title: str) -> bool:
        """Whether a passage has this title."""
        return any(self.sources[row].title == title for row in self.of_title(title)[:1])

    def facts(self, label: str) -> Sequence[tuple[Fact, str]]:
        """The facts of a label and the texts in which they stand, as often as they occur."""
        rows, hashed = self.of_label(label), hash_id(label)

        def read(at: int) -> tuple[Fact, str]:
            source, before = self.sources[rows[at]], at - int(np.searchsorted(rows, rows[at]))
            same = (fact for fact in source.facts if hash_id(fact.label) == hashed)
            return next(fact for n, fact in enumerate(same) if n == before), source.text

        return Drawn(len(rows), read)

    def _pieces(self, counts: Any, of: Callable[[FactPassage], list[str]]) -> Sequence[str]:
        """What `of` gives for each passage, one after the other; `counts`: how many of each."""
        ends_n = np.cumsum(np.asarray(counts, np.int64))

        def read(at: int) -> str:
            row = int(np.searchsorted(ends_n, at, side="right"))
            return of(self.sources[row])[at - int(ends_n[row])]  # counts from the passage's end

        return Drawn(int(ends_n[-1]) if len(ends_n) else 0, read)


class _Alike:
    """The rows of equal hashes, ascending; 12 bytes each."""

    def __init__(self, hashes: Any, rows_n: np.ndarray) -> None:
        hashes_n = np.asarray(hashes, np.uint64)
        order_n = np.argsort(hashes_n, kind="stable")
        self._hashes_n, self._rows_n = hashes_n[order_n], rows_n[order_n]

    def rows(self, hashed: int) -> np.ndarray:
        first, last = (
            int(np.searchsorted(self._hashes_n, np.uint64(hashed), side))
            for side in ("left", "right")
        )
        return self._rows_n[first:last]


def _words(source: FactPassage) -> list[str]:
    return source.text.split()[::_SHARE]


def _small_words(source: FactPassage) -> list[str]:
    return [word for word in _words(source) if word.isalpha() and word.islower()]


def other_title(corpus: FactCorpus, rng: np.random.Generator) -> str:
    """A title of the file, or random words."""
    if rng.random() < 0.5:
        return corpus.titles[int(rng.integers(len(corpus.titles)))]
    return random_words(corpus, rng)


def random_words(corpus: FactCorpus, rng: np.random.Generator) -> str:
    """One to three words."""
    words = corpus.words
    return " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(1, 4))))
