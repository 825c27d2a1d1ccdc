"""Task `cloze`: ask for the values of a passage by their labels; a pretext from text alone.

Where a text consists of facts (`Field: subfield: value`), a label and the passage's title
make a query that is close to a question, and the value is its answer. Two uses:

* with retrieval, the passage has to be found by title and label (and, for the contrastive
  pretraining of the retriever, is the positive of the query);
* with given passages, values and titles can be exchanged in passage and target alike
  (`exchange`), so that nothing can be remembered and the only way to the target is to
  read. That teaches a reader to look up and copy, quickly.
"""

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import gin
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import FieldTypes
from atlas_jax.tasks.base import (
    Example,
    PassageText,
    Prediction,
    Record,
    check_format,
    load_records,
    score_answers,
    score_retrieval,
)
from atlas_jax.tasks.facts import Fact, find_facts


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """What the records of one file share, to draw exchanged values and distractors from."""

    titles: tuple[str, ...]
    words: tuple[str, ...]
    values: dict[str, list[str]]
    by_title: dict[str, list[int]]
    by_label: dict[str, list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class ClozeRecord:
    """A passage with its facts; `number` is its place among the records of the file."""

    passage: Record
    facts: tuple[Fact, ...]
    number: int
    all: "list[ClozeRecord]"
    corpus: Corpus


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ClozeTask:
    """Lines `{id, title, section?, text}`; passages without facts are left out.

    Attributes:
      max_facts: facts asked for in one query, each with its own sentinel; their number is
        drawn evenly from 1 up to this.
      max_value_words: longer values are not asked for.
      query_format: the reader's query, of {asked}: title, labels and sentinels.
      ask_format: one of the facts asked for, of {label} and {sentinel}.
      noise: probability with which the asked words are disturbed as a question would: some
        words of the label missing, other words around, the title last.
      exchange: probability with which a value of the given passage is exchanged for
        another (one of the same label, or random words); the title with half of it.
      given_passages: how many passages come with the example, the asked one among them at
        a random place; 0 = none (they are retrieved). The others are of the same title or
        hold the same label.
      window_words: the given passages are cut to runs of facts of about so many words; 0 =
        whole passages.
      filter_self: the passage itself may not be retrieved.
      filter_self_after: first training step at which that holds.
    """

    max_facts: int = 1
    max_value_words: int = 8
    query_format: str = "question: {asked}"
    ask_format: str = "{label} answer: {sentinel}"
    noise: float = 0.0
    exchange: float = 0.0
    given_passages: int = 0
    window_words: int = 0
    filter_self: bool = False
    filter_self_after: int = 0

    name: ClassVar[str] = "cloze"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
          UserError: names the binding.
        """
        check_format("ClozeTask.query_format", self.query_format, ["asked"])
        check_format("ClozeTask.ask_format", self.ask_format, ["label", "sentinel"])
        for name in ("noise", "exchange"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"ClozeTask.{name} = {getattr(self, name)}: expected 0 to 1")
        for name, least in (
            ("max_facts", 1), ("max_value_words", 1), ("given_passages", 0), ("window_words", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise UserError(f"ClozeTask.{name} = {value}: expected {least} or more")
        if self.exchange and not self.given_passages:
            raise UserError(
                f"ClozeTask.exchange = {self.exchange} changes given passages, but "
                "ClozeTask.given_passages = 0"
            )

    def load(self, path: str | Path, need_targets: bool = True) -> list[ClozeRecord]:
        """See `Task.load`; passages without facts are left out."""
        required: FieldTypes = {"id": (str, int), "title": str, "text": str}
        passages = load_records(path, required, {"section": str}, not_empty=["id", "text"])
        found = [(p, find_facts(p.fields["text"], self.max_value_words)) for p in passages]
        found = [(p, facts) for p, facts in found if facts]
        if not found:
            raise UserError(f"{path}: no passage has a fact of the form 'Field: value'")
        everything: list[ClozeRecord] = []
        corpus = _corpus(found)
        everything.extend(
            ClozeRecord(p, facts, number, everything, corpus)
            for number, (p, facts) in enumerate(found)
        )
        return everything

    def example(
        self, record: ClozeRecord, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; facts, wording and exchanged values vary."""
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(record.passage.id.encode("utf-8")))
        title = record.passage.fields["title"]
        count = min(int(rng.integers(1, self.max_facts + 1)), len(record.facts))
        first = int(rng.integers(len(record.facts)))
        given: tuple[PassageText, ...] | None = None
        text, facts = record.passage.fields["text"], record.facts
        asked = facts[first]
        if self.given_passages:
            if rng.random() < self.exchange / 2:
                title = self._other_title(record, rng)
            text, asked, facts = self._exchanged(record, asked, rng)
            given = self._with_distractors(record, asked.label, title, text, rng)
        others = [facts[i] for i in rng.permutation(len(facts)) if facts[i] != asked]
        chosen = (asked, *others[: count - 1])
        words = self._asked(record, title, chosen, rng)
        values = [fact.value(text) for fact in chosen]
        hidden = self.filter_self and step >= self.filter_self_after
        return Example(
            id=record.passage.id,
            query_text=self.query_format.format(asked=words),
            retriever_text=self._asked(record, title, chosen[:1], rng, sentinels=False),
            target_text=" ".join(f"<extra_id_{i}> {value}" for i, value in enumerate(values)),
            answers=(" ".join(values),),
            gold_ids=(record.passage.id,),
            excluded_ids=(record.passage.id,) if hidden else (),
            given_passages=given,
            meta={"title": title, **record.passage.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match and F1 of the values joined by blanks; recall as in `tasks.base`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)

    def _asked(
        self,
        record: ClozeRecord,
        title: str,
        facts: Sequence[Fact],
        rng: np.random.Generator,
        sentinels: bool = True,
    ) -> str:
        """Title and labels as a query, disturbed with probability `noise`."""
        disturbed = rng.random() < self.noise
        labels = []
        for number, fact in enumerate(facts):
            words = fact.label.split()
            if disturbed:
                words = [word for word in words if rng.random() > 0.25] or words
                words = [*self._noise_words(record, rng), *words]
            if not sentinels:
                labels.append(" ".join(words))
                continue
            if disturbed and number + 1 == len(facts) == 1 and rng.random() < 0.6:
                words = [*words, *self._noise_words(record, rng), title]
                title = ""
            ask = self.ask_format.format(label=" ".join(words), sentinel=f"<extra_id_{number}>")
            labels.append(ask)
        if not sentinels and disturbed and rng.random() < 0.6:
            return " ".join([*labels, *self._noise_words(record, rng), title])
        return " ".join([*([title] if title else []), *labels])

    def _noise_words(self, record: ClozeRecord, rng: np.random.Generator) -> list[str]:
        words = record.corpus.words
        return [words[i] for i in rng.integers(0, len(words), int(rng.integers(0, 4)))]

    def _other_title(self, record: ClozeRecord, rng: np.random.Generator) -> str:
        titles, words = record.corpus.titles, record.corpus.words
        if rng.random() < 0.5:
            return titles[int(rng.integers(len(titles)))]
        return " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(1, 4))))

    def _exchanged(
        self, record: ClozeRecord, asked: Fact, rng: np.random.Generator
    ) -> tuple[str, Fact, tuple[Fact, ...]]:
        """The passage's text with values exchanged, the asked fact in it, and all facts in it."""
        text = record.passage.fields["text"]
        left, right, kept = _window(text, record.facts, asked, self.window_words, rng)
        pieces: list[str] = []
        facts: list[Fact] = []
        at, length = left, 0
        for fact in kept:
            pieces.append(text[at : fact.start])
            value = self._new_value(record, fact, rng) or fact.value(text)
            start = length + len(pieces[-1])
            pieces.append(value)
            length = start + len(value)
            facts.append(Fact(fact.label, start, length))
            at = fact.end
        pieces.append(text[at:right])
        return "".join(pieces), facts[kept.index(asked)], tuple(facts)

    def _new_value(self, record: ClozeRecord, fact: Fact, rng: np.random.Generator) -> str | None:
        if rng.random() >= self.exchange:
            return None
        if rng.random() < 0.5:
            values = record.corpus.values[fact.label]
            return values[int(rng.integers(len(values)))]
        words = record.corpus.words
        return " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(1, 4))))

    def _with_distractors(
        self, record: ClozeRecord, label: str, title: str, text: str, rng: np.random.Generator
    ) -> tuple[PassageText, ...]:
        """The asked passage among others of the same title, or with the same label."""
        own = record.passage
        asked = {
            "id": own.id, "title": title, "section": own.fields.get("section") or "", "text": text
        }  # fmt: skip
        passages: list[PassageText] = [asked]
        while len(passages) < self.given_passages:
            same_label = rng.random() < 0.5
            pool = (
                record.corpus.by_label[label]
                if same_label
                else record.corpus.by_title[own.fields["title"]]
            )
            other = record.all[pool[int(rng.integers(len(pool)))]]
            holds_it = any(fact.label == label for fact in other.facts)
            of_this_title = other.passage.fields["title"] == own.fields["title"]
            if of_this_title and holds_it:  # it would answer the query, too
                other, of_this_title = record.all[int(rng.integers(len(record.all)))], False
            about = next((f for f in other.facts if f.label == label), other.facts[0])
            passages.append(
                {
                    "id": other.passage.id,
                    "title": title if of_this_title else other.passage.fields["title"],
                    "section": other.passage.fields.get("section") or "",
                    "text": self._exchanged(other, about, rng)[0],
                }
            )
        place = int(rng.integers(len(passages)))
        passages[0], passages[place] = passages[place], passages[0]
        return tuple(passages)


def _window(
    text: str, facts: tuple[Fact, ...], asked: Fact, words: int, rng: np.random.Generator
) -> tuple[int, int, list[Fact]]:
    """A stretch of the text of about `words` words that holds the asked fact, and its facts.

    It begins where a fact's label may begin and ends where a fact's value ends.
    """
    if words == 0:
        return 0, len(text), list(facts)
    at = facts.index(asked)
    first = last = at
    per_word = 6.5  # characters, blank included

    def left_of(number: int) -> int:
        return facts[number - 1].end if number else 0

    while True:
        options = [n for n in (first - 1, last + 1) if 0 <= n < len(facts)]
        if not options:
            break
        n = options[int(rng.integers(len(options)))]
        low, high = min(n, first), max(n, last)
        if facts[high].end - left_of(low) > words * per_word:
            break
        first, last = low, high
    left = left_of(first)
    while left < facts[first].start and not text[left].isalpha():
        left += 1  # the punctuation that closes the fact before
    return left, facts[last].end, list(facts[first : last + 1])


def _corpus(found: Sequence[tuple[Record, tuple[Fact, ...]]]) -> Corpus:
    values: dict[str, list[str]] = defaultdict(list)
    by_title: dict[str, list[int]] = defaultdict(list)
    by_label: dict[str, list[int]] = defaultdict(list)
    words: list[str] = []
    for number, (passage, facts) in enumerate(found):
        text = passage.fields["text"]
        by_title[passage.fields["title"]].append(number)
        for fact in facts:
            values[fact.label].append(fact.value(text))
            by_label[fact.label].append(number)
        words.extend(text.split()[::7])  # one word in seven is enough to draw from
    return Corpus(tuple(by_title), tuple(words), dict(values), dict(by_title), dict(by_label))
