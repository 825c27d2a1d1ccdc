"""Leak control: remove passages from a corpus that give evaluation questions away."""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import read_passages
from atlas_jax.core.jsonl import STRICT, RowsConfig, write_jsonl
from atlas_jax.core.paths import check_output_file
from atlas_jax.core.progress import show_progress
from atlas_jax.tasks.base import Example, Task
from atlas_jax.tasks.metrics import answer_in_passage
from atlas_jax.tasks.words import words

_ARTICLE = re.compile(r"^(a|an|the)\s+", re.IGNORECASE)  # an answer is given away without it, too
_OVERLAPS = ("question", "question_and_answer", "question_or_answer")

# Runs of words by length, each with the examples whose `question` or `answer` contains it.
_Grams = Mapping[int, Mapping[str, list[tuple[int, str]]]]


@dataclasses.dataclass(frozen=True)
class LeakConfig:
    """What is taken out of a corpus.

    passages: jsonl corpus.
    files, task: one or more evaluation files of one task. The question is the retriever's query.
    output: the corpus without the passages that leak.
    report: jsonl, one line for each passage that leaks: the question, and the words they share.
    ngram: a passage overlaps a question if they share this many words in a row, or all words of a
        shorter question. Case and punctuation do not count. In scripts without blanks between
        words (Chinese, Thai) each character counts as a word.
    overlap: which passages are removed. 'question': those that overlap a question.
        'question_and_answer': those that also contain an accepted answer. 'question_or_answer':
        those that overlap a question, or in the same way an accepted answer or an option.
    min_answer_words: shorter answers and options never count as an overlap. A name or a year is in
        many passages that give nothing away.
    """

    passages: str = ""
    files: str | tuple[str, ...] = ()
    output: str = ""
    report: str = ""
    task: str = "qa"
    ngram: bounds.AtLeast1 = 8
    overlap: str = "question"
    min_answer_words: bounds.AtLeast1 = 5

    def __post_init__(self) -> None:
        """Refuse missing values and values out of range; the error names the binding."""
        bounds.check(self)
        if self.overlap not in _OVERLAPS:
            raise UserError(
                f"LeakConfig.overlap = {self.overlap!r}: expected one of "
                f"{', '.join(map(repr, _OVERLAPS))}"
            )


@dataclasses.dataclass(frozen=True)
class LeakCounts:
    """How many passages were read and removed, and how many questions they gave away."""

    passages: int
    removed: int
    questions: int
    leaked: int


def remove_leaks(config: LeakConfig, task: Task, rows: RowsConfig = STRICT) -> LeakCounts:
    """Write the corpus without the passages that leak, and the report.

    The corpus is read twice and never held in memory; the n-grams of the evaluation files are.

    Args:
      config: which files.
      task: reads the lines of the evaluation files.
      rows: what happens to a broken line.

    Raises:
      UserError: a file is at fault; names the file and the line.
    """
    for name in ("passages", "files", "output", "report"):
        if not getattr(config, name):
            raise UserError(f"LeakConfig.{name} is not given: bind it to a jsonl file")
    for name in ("output", "report"):
        check_output_file(getattr(config, name), f"LeakConfig.{name}")
    leaks = LeakFilter.of(config, task, rows)
    leaked: set[tuple[str, str]] = set()
    removed: set[int] = set()
    total = 0

    def report() -> Iterator[dict[str, Any]]:
        nonlocal total
        for line, passage in show_progress("find leaks", _passages(config, rows)):
            total += 1
            found = leaks(passage)
            if found is not None:
                removed.add(line)
                leaked.add((found["file"], found["question"]))
                yield found

    write_jsonl(config.report, report())
    kept = (passage for line, passage in _passages(config, rows) if line not in removed)
    write_jsonl(config.output, kept)
    return LeakCounts(total, len(removed), len(leaks.asked), len(leaked))


@dataclasses.dataclass(frozen=True)
class LeakFilter:
    """Tells of a passage whether it leaks. It is pickled small: the n-grams are made when used.

    Attributes:
      asked: file and example of each evaluation question.
      config: when a passage leaks.
    """

    asked: tuple[tuple[str, Example], ...]
    config: LeakConfig

    @classmethod
    def of(cls, config: LeakConfig, task: Task, rows: RowsConfig = STRICT) -> "LeakFilter":
        """The filter of the questions in `config.files`.

        Raises:
          UserError: a file is at fault; names the file and the line.
        """
        files = (config.files,) if isinstance(config.files, str) else config.files
        return cls(
            tuple((f, task.example(one)) for f in files for one in task.load(f, False, rows)),
            config,
        )

    def __call__(self, passage: Mapping[str, Any]) -> dict[str, Any] | None:
        """The line of the report on a passage that leaks; None for one that does not."""
        found = self._first(passage)
        if found is None:
            return None
        place, side, shared = found
        file, example = self.asked[place]
        return {
            "passage": str(passage["id"]),
            "title": passage.get("title") or "",
            "file": file,
            "question": example.id,
            "side": side,
            "shared": shared,
            "answer_in_passage": _has_answer(passage, example),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without the n-grams."""
        return {"asked": self.asked, "config": self.config}

    def _first(self, passage: Mapping[str, Any]) -> tuple[int, str, str] | None:
        """The first question given away, whether by question or answer, and the shared words."""
        row = words(_text(passage))
        needs_answer = self.config.overlap == "question_and_answer"
        for length, known in self._grams.items():
            for start in range(len(row) - length + 1):
                shared = " ".join(row[start : start + length])
                for place, side in known.get(shared, ()):
                    if not needs_answer or _has_answer(passage, self.asked[place][1]):
                        return place, side, shared
        return None

    @functools.cached_property
    def _grams(self) -> _Grams:
        found: dict[int, dict[str, list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
        for place, (_, example) in enumerate(self.asked):
            for side, row in _sides(example, self.config):
                length = min(self.config.ngram, len(row))
                for start in range(len(row) - length + 1 if length else 0):
                    found[length][" ".join(row[start : start + length])].append((place, side))
        return found


def _sides(example: Example, config: LeakConfig) -> list[tuple[str, list[str]]]:
    """The words of the question and, if they count by themselves, of answers and options."""
    sides = [("question", words(example.retriever_text))]
    if config.overlap == "question_or_answer":
        options = (choice.answer for choice in example.choices)
        answers = [words(text) for text in dict.fromkeys((*example.answers, *options))]
        sides += [("answer", one) for one in answers if len(one) >= config.min_answer_words]
    return sides


def _passages(config: LeakConfig, rows: RowsConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    found = read_passages(config.passages, rows=rows)
    return ((number, passage) for number, (_, passage) in enumerate(found))


def _has_answer(passage: Mapping[str, Any], example: Example) -> bool:
    bare = (_ARTICLE.sub("", answer) for answer in example.answers)
    return answer_in_passage(_text(passage), [*example.answers, *bare])


def _text(passage: Mapping[str, Any]) -> str:
    """All text of a passage that can be searched or read."""
    parts = (passage.get("title"), passage.get("section"), passage["text"])
    return " ".join(part for part in parts if part)
