"""What the demo reads and asks about: the World Factbook, SQuAD, or files of one's own.

Each function here writes into the demo's folder what its runs read: passages, 64 questions to learn
from, and the questions to be asked.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import read_passages
from atlas_jax.core.jsonl import JsonObject, plain_or_gz, read_jsonl, write_jsonl
from atlas_jax.core.layouts import QUESTIONS
from atlas_jax.demo import factbook
from atlas_jax.demo.factbook_splits import stable_random
from atlas_jax.tasks.base import load_records
from atlas_jax.tasks.metrics import answer_in_passage
from atlas_jax.tasks.qa import check_answers

ASKED = "questions_asked.jsonl"
_FEW = "questions_to_learn_from.jsonl"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A corpus, and what is asked about it.

    Attributes:
      passages: jsonl, all that is searched.
      few: jsonl, the questions that train.
      asked: jsonl, those that are asked afterwards.
      lesson: jsonl, passages of facts whose titles the lesson may ask about; None = no lesson.
      about: ends the sentence "300 questions ...".
      name: of the corpus.
    """

    passages: Path
    few: Path
    asked: Path
    lesson: Path | None
    about: str
    name: str


Prepare = Callable[[Path, int, int], Asked]


def world_factbook(folder: Path, seed: int, count: int) -> Asked:
    """The Factbook: questions about countries that neither question nor lesson names.

    Args:
      folder: where everything is written.
      seed: draws the 64 questions.
      count: at most this many questions are asked, the same ones for every seed; 0 = all.
    """
    factbook.prepare(folder)
    test = _read(folder / "test.jsonl")
    drawn = _draw(test, count)
    write_jsonl(folder / ASKED, drawn)
    countries = len({row["entity"] for row in drawn})
    return Asked(
        folder / "passages.jsonl",
        folder / factbook.few_shot_name(seed),
        folder / ASKED,
        folder / "passages_pretraining.jsonl",
        f"about {countries} countries that training never named",
        "CIA World Factbook",
    )


def own_files(passages: Path, questions: Path, test: Path | None = None) -> Prepare:
    """Passages and questions of one's own, in any layout of docs/data_formats.md.

    Args:
      passages: jsonl.
      questions: jsonl. 64 of them train, or two thirds if there are fewer than 96.
      test: jsonl, the questions that are asked. All of `questions` train then. None = what of
        `questions` does not train is asked.
    """

    def source(folder: Path, seed: int, count: int) -> Asked:
        rows = [
            {"id": p["id"], "title": p.get("title") or "", "section": p.get("section") or "",
             "text": p["text"]}
            for _, p in read_passages(passages)
        ]  # fmt: skip
        given = _questions(questions)
        learn, rest = (given, _questions(test)) if test else _parted(given, seed)
        write_jsonl(folder / "passages.jsonl", rows)
        write_jsonl(folder / _FEW, learn)
        write_jsonl(folder / ASKED, _with_gold(_draw(rest, count), rows))
        return Asked(
            passages=folder / "passages.jsonl",
            few=folder / _FEW,
            asked=folder / ASKED,
            lesson=None,
            about="that training has not seen",
            name=passages.resolve().parent.name + "/" + passages.name,
        )

    return source


def squad_files(data: Path) -> Prepare:
    """SQuAD-open: 64 questions with `bm25_rank` 5 or less train, those of other articles are asked.

    Args:
      data: folder with `passages`, `train_64shot` and `test`, each .jsonl or .jsonl.gz.

    Raises:
      UserError: a file is missing.
    """

    def one(name: str) -> Path:
        if path := plain_or_gz(data / f"{name}.jsonl"):
            return path
        raise UserError(f"--data={data}: {name}.jsonl or {name}.jsonl.gz is missing")

    return own_files(one("passages"), one("train_64shot"), one("test"))


def _with_gold(questions: Sequence[JsonObject], passages: Sequence[JsonObject]) -> list[JsonObject]:
    """Where a question names no gold passage, those that hold an answer count."""

    def holding(answers: Sequence[str]) -> list[str]:
        return [p["id"] for p in passages if answer_in_passage(p["text"], answers)]

    return [{**q, "gold": q["gold"] or holding(q["answers"])} for q in questions]


def _parted(rows: Sequence[JsonObject], seed: int) -> tuple[list[JsonObject], list[JsonObject]]:
    """Questions to learn from and the others, drawn by the seed."""
    if len(rows) < 3:
        raise UserError(
            f"--questions: the demo needs 3 questions or more, but {len(rows)} are given"
        )
    order = stable_random("own questions", str(seed)).sample(range(len(rows)), len(rows))
    size = min(factbook.FEW_SHOT, 2 * len(rows) // 3)
    return [rows[i] for i in order[:size]], [rows[i] for i in order[size:]]


def _questions(path: Path) -> list[JsonObject]:
    """The questions of a file, with the fields that the demo's table and swap read."""
    return [
        {
            "id": record.id,
            "question": record.fields["question"],
            "answers": record.fields.get("answers") or [record.fields["target"]],
            "gold": list(record.gold_ids),
        }
        for record in load_records(
            path, {"question": str}, {"answers": list, "target": str}, ["question"],
            lambda record: check_answers(record, needed=True), layouts=QUESTIONS,
        )
    ]  # fmt: skip


def _draw(rows: Sequence[JsonObject], count: int) -> list[JsonObject]:
    """Some rows, always the same ones, in the order of the file."""
    if not count or len(rows) <= count:
        return list(rows)
    kept = sorted(stable_random("asked").sample(range(len(rows)), count))
    return [rows[i] for i in kept]


def _read(path: Path) -> list[JsonObject]:
    return [record for _, record in read_jsonl(path)]
