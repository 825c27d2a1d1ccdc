"""Task `sentences`: questions about the sentences of passages, made from text alone.

A salient part of a sentence is the answer: a name, a number or a date; or a short run of words
between small ones, which is often a noun phrase. The sentence without it is a query with a gap. Or
it becomes similar to a question: some of its words after a question word that fits the answer
("noisy cloze", Lewis et al. 2019, arXiv 1906.04980). In text of the form `Field: subfield: value`
the label is used in place of the sentence. The passages are retrieved, so the reader also sees the
wrong ones that a question would find.

If the answer occurs a second time in its passage, the sentence itself can be hidden there. Then the
reader must learn more than to match words.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from atlas_jax.core.formats import Filled, fill, literal
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.tasks.base import (
    Example,
    Hidden,
    Prediction,
    Record,
    check_format,
    score_answers,
    score_retrieval,
)
from atlas_jax.tasks.facts import askable, find_facts
from atlas_jax.tasks.pretext import check_range, load_passages
from atlas_jax.tasks.spans import layout

_END = re.compile(r"(?<=[a-z0-9)\]\"'”’%])[.!?]['\"”’)]*\s+(?=[A-Z\"'“‘(\[])")
_WORDS = re.compile(r"\S+")
_DATE = re.compile(r"\b(?:January|February|March|April|May|June|July|August|September|October|"
                   r"November|December)\b|^(?:1\d|20)\d\d$")  # fmt: skip
_SMALL = frozenset(
    "a an the of in on at by for from to and or but as is was are were be been it its he she they "
    "his her their this that these those with which who whom whose when where while into than then "
    "also not no had has have do does did will would can could may might such so if there about "
    "after before during between through over under more most less many much some any all each "
    "both other only even very up out they them him we you i my your our what how why because "
    "since until within without against among per via became include includes including included "
    "used called known began made said took whose should must being like".split()
)
_OPENS = frozenset("a an the of in on by for from with his her their its our as to into".split())
_STOPS = '.,;:!?()[]"“”/–—'  # no chunk goes over one of these at a word's begin or end
_PART = frozenset(  # of a date or a name; alone it answers nothing
    "January February March April May June July August September October November December Monday "
    "Tuesday Wednesday Thursday Friday Saturday Sunday BC AD CE BCE Mr Mrs Dr".split()
)
_NOTE = re.compile(r"\b(?:note|continued)\b")  # a label that says nothing of its value
_LETTERS = re.compile(r"(?:[A-Z]\.)+[A-Z]")
_ASK = {
    "date": ("when", "what year", "in what year", "when was", "when did", "on what date"),
    "number": ("how many", "how much", "what", "what number of", "how many", "what is the"),
    "entity": ("who", "what", "which", "where", "what is the name of", "in what", "who was"),
    "phrase": ("what", "what is", "how", "which", "what did", "why", "what kind of"),
    "value": ("what", "what is the", "what is", "which", "who is the", "which is", "name"),
    "value date": ("when", "when was", "what is the date of", "in what year", "date of"),
    "value number": ("what is the", "how many", "how much", "what is", "what"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """A stretch to ask for: where it stands, its kind, and the stretch that tells of it."""

    start: int
    end: int
    kind: str
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class SentencesTask:
    """Lines `{id, title?, section?, text, passages?}`.

    Attributes:
      max_answer_words: longer stretches are not asked for.
      within_words: answers come from this many first words of a passage, as the models may not
        see more; 0 = from all of it.
      query_words: the query is a crop of this many words around the gap.
      as_question: probability of words after a question word, instead of a sentence with a gap.
      drop: up to this share of a question's words is missing.
      title: probability that the passage's title is part of the query.
      phrases: probability of asking for a short run of words between small ones, instead of a name,
        a number or a date.
      facts: probability of asking for a fact by its label, if the text has facts.
      hide: probability of hiding the sentence in its passage, if the answer occurs there a second
        time.
      min_words: passages of fewer words are left out.
      query_format: the reader's query, of {query}; the gap is `<extra_id_0>`.
      question_format: the same for a query similar to a question, which has no gap.
    """

    max_answer_words: int = 6
    within_words: int = 0
    query_words: int = 24
    as_question: float = 0.7
    drop: float = 0.4
    title: float = 0.5
    phrases: float = 0.15
    facts: float = 0.8
    hide: float = 0.5
    min_words: int = 10
    query_format: str = "{query}"
    question_format: str = "question: {query} answer: <extra_id_0>"

    name: ClassVar[str] = "sentences"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
          UserError: names the binding.
        """
        name = "SentencesTask"
        check_format(f"{name}.query_format", self.query_format, ["query"])
        check_format(f"{name}.question_format", self.question_format, ["query"])
        for field in ("as_question", "drop", "title", "phrases", "facts", "hide"):
            value = getattr(self, field)
            check_range(f"{name}.{field}", value, 0 <= value <= 1, "0 to 1")
        for field, least in (
            ("max_answer_words", 1), ("within_words", 0), ("query_words", 4), ("min_words", 4),
        ):  # fmt: skip
            value = getattr(self, field)
            check_range(f"{name}.{field}", value, value >= least, f"{least} or more")

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[Record]:
        """See `Task.load`; passages of fewer than `min_words` words are left out."""
        return load_passages(path, self.min_words, "SentencesTask.min_words", rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what is asked for, and in which words, varies."""
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(record.id.encode("utf-8")))
        text, title = record.fields["text"], record.fields.get("title") or ""
        asked = self._choose(text, rng)
        answer = text[asked.start : asked.end]
        before = text[asked.first : asked.start].split()
        after = text[asked.end : asked.last].split()
        is_fact = ":" in asked.kind  # a label needs its title
        told = rng.random() < self.title or is_fact
        if is_fact or rng.random() < self.as_question:
            query = self._question(asked, before, after, title if told else "", rng)
            reader_query = fill(self.question_format, query=query)
            retriever_query = literal(query)
        else:
            parts = self._sentence(before, after, title if told else "", rng)
            gap = " <extra_id_0> ".join(literal(part) for part in parts).strip()
            reader_query = fill(self.query_format, query=Filled(gap))
            retriever_query = literal(" ".join(parts))
        return Example(
            id=record.id,
            query_text=reader_query,
            retriever_text=retriever_query,
            target_text=f"<extra_id_0> {literal(answer)}",
            answers=(answer,),
            gold_ids=(record.id,),
            given_passages=record.passages,
            may_hide=self.hide > 0,
            included_id=record.id,
            hidden=self._hidden(record.id, text, answer, asked, rng),
            meta={"title": title, **record.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match and F1; recall as in `tasks.base`."""
        return score_answers(predictions) | score_retrieval(predictions, recall_at)

    def _choose(self, text: str, rng: np.random.Generator) -> _Asked:
        """What is asked for."""
        words = [match.span() for match in _WORDS.finditer(text)]
        limit = len(text)
        if self.within_words and len(words) > self.within_words:
            limit = words[self.within_words - 1][1]
        facts = [fact for fact in find_facts(text) if fact.end <= limit]
        facts = [
            fact
            for fact in askable(facts, text, self.max_answer_words)
            if not _NOTE.search(fact.label) and fact.value(text).split()[-1] not in _SMALL
        ]
        if facts and rng.random() < self.facts:
            fact = facts[int(rng.integers(len(facts)))]
            first = text.rfind(". ", 0, fact.start) + 1
            kind = f"value{_type_of(text[fact.start : fact.end])}"
            return _Asked(fact.start, fact.end, f"{kind}:{fact.label}", first, fact.end)
        salient = [span for span in _salient(text, self.max_answer_words) if span[1] <= limit]
        phrases = list(_chunks(text, [span for span in words if span[1] <= limit]))
        found = phrases if not salient or phrases and rng.random() < self.phrases else salient
        if not found:  # nothing stands out: the first word
            found = [(*words[0], "phrase")]
        start, end, kind = found[int(rng.integers(len(found)))]
        return _Asked(start, end, kind, *_sentence_around(text, start, end))

    def _question(
        self,
        asked: _Asked,
        before: Sequence[str],
        after: Sequence[str],
        title: str,
        rng: np.random.Generator,
    ) -> str:
        """A question word, some of the sentence's words, and the title."""
        kind, _, label = asked.kind.partition(":")
        if label:
            words = [word.strip(" -,()").lower() for word in label.split()]
            words = [word for word in words if word]
            if rng.random() < 0.3:
                rng.shuffle(words)
        else:
            half = self.query_words // 2
            words = [*before[-half:], *after[:half]]
        lost = rng.random() * self.drop
        kept = [word for word in words if rng.random() >= lost] or list(words)
        ask = _ASK[kind]
        parts = [] if rng.random() < 0.2 else [ask[int(rng.integers(len(ask)))]]
        if title and rng.random() < 0.3:
            parts.append(title)
            title = ""
        parts += [word.rstrip(".;:") for word in kept]
        if title:
            parts += [("of", "in", "for", "")[int(rng.integers(4))], title]
        query = " ".join(part for part in parts if part)
        return f"{query}?" if rng.random() < 0.6 else query

    def _sentence(
        self, before: Sequence[str], after: Sequence[str], title: str, rng: np.random.Generator
    ) -> tuple[str, str]:
        """The sentence on both sides of its gap, cropped."""
        room = self.query_words
        left = min(len(before), int(rng.integers(room // 4, 3 * room // 4 + 1)))
        right = max(room - left, 0)
        shown = before[len(before) - left :]
        return " ".join([f"{title}:", *shown] if title else shown), " ".join(after[:right])

    def _hidden(
        self, passage_id: str, text: str, answer: str, asked: _Asked, rng: np.random.Generator
    ) -> Hidden | None:
        """The sentence, if it should be hidden in its passage."""
        elsewhere = answer in text[: asked.first] or answer in text[asked.last :]
        if not elsewhere or ":" in asked.kind or rng.random() >= self.hide:
            return None
        return Hidden(passage_id, asked.first, asked.last)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by its punctuation and the capitals after it; none for no text."""
    ends = [found.end() for found in _END.finditer(text)]
    parts = (text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True))
    return [part for part in parts if part]


def _sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Beginning and end of the sentence around a part of the text."""
    first, last = 0, len(text)
    for stop in _END.finditer(text):
        if stop.end() <= start:
            first = stop.end()
        elif stop.start() + 1 >= end:
            last = stop.start() + 1
            break
    return first, last


def _salient(text: str, max_words: int) -> Iterator[tuple[int, int, str]]:
    """The whole numbers, dates and names of a text: start, end and kind."""
    for kind in ("number", "entity"):
        for span in layout(text, (kind,), max_words).salient:
            start, end = span.start, span.end
            if text[end - 2 : end] in ("'s", "’s"):
                end -= 2
            end = _end(text, start, end)
            piece = text[start:end]
            beside = text[start - 1 : start] + text[end : end + 1]
            if piece in _PART or re.search(r"[\w–−-]", beside):
                continue  # a part of something: the 19 of 19th, the June of 3 June
            yield start, end, _type_of(piece).strip() or "entity"


def _chunks(text: str, words: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
    """Runs of up to four words that small words or stops end on both sides.

    An article, a preposition or a pronoun stands in front, so that a run is often the whole of a
    noun phrase.
    """
    run: list[tuple[int, int]] = []
    opened = False
    for start, end in words:
        word = text[start:end]
        bare = word.strip(_STOPS)
        opens = word.lower() in _OPENS
        if word[0] in _STOPS or bare.lower() in _SMALL:
            yield from _chunk(run)
            run, opened = [], opens
            continue
        stops = word[-1] in _STOPS
        if opened:
            run.append((start, _end(text, start, start + len(word.rstrip(_STOPS)))))
        if stops:
            yield from _chunk(run)
            run, opened = [], False


def _end(text: str, start: int, end: int) -> int:
    """The end of a stretch, with the full stop that belongs to `U.S.`."""
    return end + (text[end : end + 1] == "." and _LETTERS.fullmatch(text, start, end) is not None)


def _chunk(run: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
    if 1 <= len(run) <= 4:
        yield run[0][0], run[-1][1], "phrase"


def _type_of(value: str) -> str:
    """` date`, ` number` or nothing, by the form of a value."""
    if _DATE.search(value):
        return " date"
    return " number" if re.match(r"[-−$€£]?\d", value) else ""
