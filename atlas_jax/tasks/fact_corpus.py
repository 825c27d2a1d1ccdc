"""All passages with facts of a file, to draw titles, words and values from.

The cloze task exchanges values and titles for others of its file, and puts other passages beside
the asked one. Both come from here.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from atlas_jax.tasks.base import Record
from atlas_jax.tasks.facts import Fact, askable, find_facts


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


@dataclasses.dataclass(frozen=True, slots=True)
class FactCorpus:
    """Shared by the records of one file, to draw exchanged values and distractors from.

    Attributes:
      sources: all passages with facts, in the order of the file.
      titles: each once.
      words: some of the words of the texts, as often as they occur.
      small_words: those of `words` in small letters, without digits and signs.
      vocabulary: the words of all texts without digits and signs, each once.
      values: of each label, as often as they occur in the file.
      by_title: places in `sources`.
      by_label: places in `sources`.
    """

    sources: tuple[FactPassage, ...]
    titles: tuple[str, ...]
    words: tuple[str, ...]
    small_words: tuple[str, ...]
    vocabulary: tuple[str, ...]
    values: dict[str, list[str]]
    by_title: dict[str, list[int]]
    by_label: dict[str, list[int]]


def make_fact_passage(passage: Record, max_words: int) -> FactPassage:
    """The facts of a passage; those to ask for have at most `max_words` words."""
    text = passage.fields["text"]
    facts = find_facts(text)
    return FactPassage(passage, askable(facts, text, max_words), tuple(f.label for f in facts))


def make_fact_corpus(sources: Sequence[FactPassage]) -> FactCorpus:
    """Collect titles, words and values of the passages of one file."""
    values: dict[str, list[str]] = defaultdict(list)
    by_title: dict[str, list[int]] = defaultdict(list)
    by_label: dict[str, list[int]] = defaultdict(list)
    words: list[str] = []
    vocabulary: dict[str, None] = {}
    for number, source in enumerate(sources):
        by_title[source.title].append(number)
        for fact in source.facts:
            values[fact.label].append(fact.value(source.text))
            by_label[fact.label].append(number)
        in_text = source.text.split()
        words.extend(in_text[::7])  # one word in seven is enough to draw from
        vocabulary.update(dict.fromkeys(filter(str.isalpha, in_text)))
    return FactCorpus(
        sources=tuple(sources),
        titles=tuple(by_title),
        words=tuple(words),
        small_words=tuple(w for w in words if w.isalpha() and w.islower()) or tuple(words),
        vocabulary=tuple(vocabulary) or tuple(words),
        values=dict(values),
        by_title=dict(by_title),
        by_label=dict(by_label),
    )


def other_title(corpus: FactCorpus, rng: np.random.Generator) -> str:
    """A title of the file, or random words."""
    if rng.random() < 0.5:
        return corpus.titles[int(rng.integers(len(corpus.titles)))]
    return random_words(corpus, rng)


def random_words(corpus: FactCorpus, rng: np.random.Generator) -> str:
    """One to three words."""
    words = corpus.words
    return " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(1, 4))))
