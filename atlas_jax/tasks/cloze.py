"""Task `cloze`: ask for the values of a passage by their labels; a pretext from text alone.

If a text consists of facts (`Field: subfield: value`), a label and the passage's title make a query
similar to a question, and the value is its answer. There are two uses:

* With retrieval, the passage must be found by title and label. For the contrastive pretraining of
  the retriever it is the positive of the query.
* With given passages, values and titles can be exchanged, in passage and target alike (`exchange`).
  Then nothing can be remembered, and the reader must read to find the target. So it quickly learns
  to look up and copy.

The queries can use the words of a few questions (`question_file`), see `tasks.asking`.
"""

import array
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import Filled, fill, literal
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.core.layouts import PASSAGES
from atlas_jax.tasks import wording
from atlas_jax.tasks.asking import Pattern, load_patterns
from atlas_jax.tasks.base import (
    Example,
    PassageText,
    Prediction,
    Record,
    check_format,
    score_answers,
    score_retrieval,
)
from atlas_jax.tasks.exchange import exchanged, window_of
from atlas_jax.tasks.fact_corpus import (
    Drawn,
    FactCorpus,
    FactPassage,
    make_fact_passage,
    other_title,
)
from atlas_jax.tasks.facts import Fact
from atlas_jax.tasks.file_records import open_records

_TRIES = 20  # failed draws after which a kind of distractor is given up


@dataclasses.dataclass(frozen=True, slots=True)
class ClozeRecord:
    """A passage to ask about, and the file that it comes from.

    Attributes:
      source: the passage.
      corpus: the passages of its file.
      fact: the fact that questions ask for.
      patterns: the questions; () = a fact is asked for by its label.
    """

    source: FactPassage
    corpus: FactCorpus = dataclasses.field(repr=False, compare=False)
    fact: Fact | None = None
    patterns: tuple[Pattern, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClozeTask:
    """Lines `{id, title, section?, text}`; passages without facts are left out.

    Attributes:
      max_facts: most facts in one query, each with its own sentinel. Their number is drawn evenly
        from 1 up to this, or up to the number of facts in the passage.
      max_value_words: longer values are not asked for.
      query_format: the reader's query, of {asked}: title, labels and sentinels.
      ask_format: one of the facts asked for, of {label} and {sentinel}.
      noise: probability of disturbing the words of a query, to make it more like a question.
        Words of the label are then missing or moved, other words stand between them, and the
        title is mostly last. A question (`question_file`) loses some words and gets others.
      question_file: lines `{question, answers}` about titles of the file. The labels that they ask
        for are asked for in their words, for all titles and equally often. Passages without such a
        label are left out.
      question_share: probability of asking in a question's words, and for one fact. Otherwise a
        label asks, as without `question_file`.
      exchange: probability of exchanging a value of the given passage for another one (of the
        same label, or random words). For the title it is half as large.
      given_passages: number of passages that come with the example, with the asked one at a
        random place; 0 = none (they are retrieved). The others have the same title or the same
        label, but do not answer the query. A small file may have too few.
      window_words: the given passages are cut to runs of facts of about this many words; 0 =
        whole passages.
      filter_self: the passage itself may not be retrieved.
      filter_self_after: first training step at which `filter_self` applies.
    """

    max_facts: int = 1
    max_value_words: int = 8
    query_format: str = "question: {asked}"
    ask_format: str = "{label} answer: {sentinel}"
    noise: float = 0.0
    question_file: str = ""
    question_share: float = 1.0
    exchange: float = 0.0
    given_passages: int = 0
    window_words: int = 0
    filter_self: bool = False
    filter_self_after: int = 0

    name: ClassVar[str] = "cloze"

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
          UserError: names the binding.
        """
        check_format("ClozeTask.query_format", self.query_format, ["asked"])
        check_format("ClozeTask.ask_format", self.ask_format, ["label", "sentinel"])
        for name in ("noise", "question_share", "exchange"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"ClozeTask.{name} = {getattr(self, name)}: expected 0 to 1")
        for name, least in (
            ("max_facts", 1), ("max_value_words", 1), ("given_passages", 0), ("window_words", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise UserError(f"ClozeTask.{name} = {value}: expected {least} or more")
        for name in ("exchange", "window_words"):
            if getattr(self, name) and not self.given_passages:
                raise UserError(
                    f"ClozeTask.{name} = {getattr(self, name)} changes given passages, but "
                    "ClozeTask.given_passages = 0"
                )

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[ClozeRecord]:
        """See `Task.load`; passages without facts are left out, and the texts stay in the file."""
        required: FieldTypes = {"id": (str, int), "title": str, "text": str}

        def has_facts(passage: Record) -> bool:
            return bool(make_fact_passage(passage, self.max_value_words).facts)

        passages = open_records(
            path, required, {"section": str}, ["id", "text"], PASSAGES, has_facts, rows
        )
        if not passages:
            raise UserError(
                f"{path}: no passage has a fact, 'Field: value' or 'Field: subfield: value', "
                f"with a value of at most {self.max_value_words} words "
                "(ClozeTask.max_value_words)"
            )
        corpus = FactCorpus(passages, self.max_value_words)
        if self.question_file:
            return _asked_records(corpus, load_patterns(self.question_file, corpus, rows))
        return Drawn(len(passages), lambda row: ClozeRecord(corpus.sources[row], corpus))

    def example(
        self, record: ClozeRecord, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; facts, wording and exchanged values vary."""
        source, corpus = record.source, record.corpus
        own_id = source.passage.id
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(own_id.encode("utf-8")))
        count = int(rng.integers(1, self.max_facts + 1))
        pattern, asked = self._pattern(record, rng), record.fact
        if pattern is None or asked is None:
            asked = source.facts[int(rng.integers(len(source.facts)))]
        title, text, facts = source.title, source.text, source.facts
        if self.given_passages:
            if rng.random() < self.exchange / 2:
                title = other_title(corpus, rng)
            text, asked, facts = self._shown(source, corpus, asked, rng, pattern)
        if pattern:
            chosen: tuple[Fact, ...] = (asked,)
            values = [pattern.answer(asked, text) or ""]
        else:
            others = [facts[i] for i in rng.permutation(len(facts)) if facts[i] != asked]
            chosen = (asked, *others[: count - 1])
            values = [fact.value(text) for fact in chosen]
        given: tuple[PassageText, ...] | None = None
        if self.given_passages:
            shown = [_passage(source, title, text)]
            shown += self._distractors(record, title, [fact.label for fact in chosen], rng)
            place = int(rng.integers(len(shown)))
            shown[0], shown[place] = shown[place], shown[0]
            given = tuple(shown)
        if pattern:
            question = self._question(corpus, pattern, title, rng)
            asking = fill(self.ask_format, label=question, sentinel=Filled("<extra_id_0>"))
            reader_query, retriever_query = fill(self.query_format, asked=asking), literal(question)
        else:
            reader_query = self._reader_query(source, corpus, title, chosen, rng)
            retriever_query = literal(self._retriever_query(source, corpus, title, asked, rng))
        hidden = self.filter_self and step >= self.filter_self_after
        return Example(
            id=own_id,
            query_text=reader_query,
            retriever_text=retriever_query,
            target_text=" ".join(
                f"<extra_id_{i}> {literal(value)}" for i, value in enumerate(values)
            ),
            answers=(" ".join(values),),
            gold_ids=(own_id,),
            excluded_ids=(own_id,) if hidden else (),
            given_passages=given,
            meta={"title": title, **source.passage.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match and F1 of the values joined by blanks; recall as in `tasks.base`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)

    def _pattern(self, record: ClozeRecord, rng: np.random.Generator) -> Pattern | None:
        """The question to ask, if any."""
        if not record.patterns or rng.random() >= self.question_share:
            return None
        return record.patterns[int(rng.integers(len(record.patterns)))]

    def _question(
        self, corpus: FactCorpus, pattern: Pattern, title: str, rng: np.random.Generator
    ) -> str:
        """A question about the title, reworded with probability `noise`."""
        if rng.random() >= self.noise:
            return pattern.question(title)
        parts = (
            wording.reworded(part.split(), corpus.small_words, corpus.vocabulary, rng)
            for part in (pattern.before, pattern.after)
        )
        before, after = (" ".join(part) for part in parts)
        return f"{before} {title} {after}".strip()

    def _reader_query(
        self,
        source: FactPassage,
        corpus: FactCorpus,
        title: str,
        facts: Sequence[Fact],
        rng: np.random.Generator,
    ) -> Filled:
        """Title, labels and sentinels, disturbed with probability `noise`."""
        disturbed = rng.random() < self.noise
        asked = []
        for number, fact in enumerate(facts):
            words = self._label(source, corpus, fact, disturbed, rng)
            if disturbed and len(facts) == 1:
                words = wording.around(words, title, rng)
                title = ""
            sentinel = Filled(f"<extra_id_{number}>")
            asked.append(fill(self.ask_format, label=" ".join(words), sentinel=sentinel))
        return fill(
            self.query_format, asked=Filled(" ".join([literal(title), *asked] if title else asked))
        )

    def _retriever_query(
        self,
        source: FactPassage,
        corpus: FactCorpus,
        title: str,
        fact: Fact,
        rng: np.random.Generator,
    ) -> str:
        """Title and label of the first fact, disturbed with probability `noise`."""
        disturbed = rng.random() < self.noise
        words = self._label(source, corpus, fact, disturbed, rng)
        if disturbed:
            return " ".join(wording.around(words, title, rng))
        return " ".join([title, *words] if title else words)

    def _label(
        self,
        source: FactPassage,
        corpus: FactCorpus,
        fact: Fact,
        disturbed: bool,
        rng: np.random.Generator,
    ) -> list[str]:
        if not disturbed:
            return fact.label.split()
        before = source.labels[: source.labels.index(fact.label)]
        return wording.disturbed(fact.label, before, corpus.small_words, corpus.vocabulary, rng)

    def _shown(
        self,
        source: FactPassage,
        corpus: FactCorpus,
        asked: Fact,
        rng: np.random.Generator,
        pattern: Pattern | None = None,
    ) -> tuple[str, Fact, tuple[Fact, ...]]:
        """The text of a given passage, the asked fact in it, and all facts in it."""
        window = window_of(source, asked, self.window_words, rng, pattern)
        return exchanged(source.text, window, asked, corpus, self.exchange, rng, pattern)

    def _distractors(
        self, record: ClozeRecord, title: str, labels: Sequence[str], rng: np.random.Generator
    ) -> list[PassageText]:
        """Other passages, half of them of the same title and half with the first label.

        None of them has both the shown title and a label that is asked for.

        Args:
          record: the record that is asked for.
          title: the title with which its passage is shown.
          labels: those asked for, the first fact's first.
          rng: random source of the choice.
        """
        source, corpus = record.source, record.corpus
        asked = frozenset(labels)
        shown: list[PassageText] = []
        used = {source.passage.id}

        def title_of(other: FactPassage) -> str:
            return title if other.title == source.title else other.title

        def draw(pool: Sequence[int] | np.ndarray) -> FactPassage | None:
            for _ in range(_TRIES):
                other = corpus.sources[pool[int(rng.integers(len(pool)))]]
                answers = title_of(other) == title and not asked.isdisjoint(other.labels)
                if not answers and other.passage.id not in used:
                    return other
            return None

        for _ in range(self.given_passages - 1):
            same_label = rng.random() < 0.5
            near = corpus.of_label(labels[0]) if same_label else corpus.of_title(source.title)
            other = draw(near) or draw(range(len(corpus.sources)))
            if other is None:
                break
            used.add(other.passage.id)
            about = next((f for f in other.facts if f.label == labels[0]), other.facts[0])
            text, _, _ = self._shown(other, corpus, about, rng)
            shown.append(_passage(other, title_of(other), text))
        return shown


def _asked_records(
    corpus: FactCorpus, patterns: Mapping[str, tuple[Pattern, ...]]
) -> Sequence[ClozeRecord]:
    """A record for each fact that questions ask for; rare labels are repeated to be as frequent."""

    def asking(source: FactPassage, fact: Fact) -> tuple[Pattern, ...]:
        return tuple(p for p in patterns.get(fact.label, ()) if p.answer(fact, source.text))

    rows, numbers = array.array("i"), array.array("i")
    for row, source in enumerate(corpus.sources):
        for number, fact in enumerate(source.facts):
            if asking(source, fact):
                rows.append(row)
                numbers.append(number)

    def read(at: int) -> ClozeRecord:
        source = corpus.sources[rows[at]]
        fact = source.facts[numbers[at]]
        return ClozeRecord(source, corpus, fact, asking(source, fact))

    return Drawn(len(rows), read)


def _passage(source: FactPassage, title: str, text: str) -> PassageText:
    section = source.passage.fields.get("section") or ""
    return {"id": source.passage.id, "title": title, "section": section, "text": text}
