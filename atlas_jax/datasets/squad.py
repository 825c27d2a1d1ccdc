"""SQuAD 1.1 with its paragraphs as the corpus: SQuAD-open (arXiv 1606.05250, 1704.00051).

The published dev file is used as test file. Every twentieth article of the train file becomes the
dev file, so no article has questions in two files. Questions were written for a paragraph, so some
of them make no sense without it.
"""

import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import BrokenRows, FieldTypes, JsonObject, RowsConfig, check_fields
from atlas_jax.datasets.convert import Dataset, Part, Read
from atlas_jax.datasets.questions import stream_list

_DEV_EVERY = 20  # articles


def _articles(path: Path, rows: RowsConfig) -> Iterator[tuple[list[JsonObject], list[JsonObject]]]:
    """Passages and questions of each article; if asked, a broken article is left out entirely."""
    broken = BrokenRows(path, rows)
    for number, raw in enumerate(stream_list(path, "data")):
        try:
            yield _article(raw, f"{path.name.split('-')[0]}-{number}", f"{path}: data[{number}]")
        except UserError as error:
            broken.take(error)
            yield [], []
    broken.tell()


def _article(raw: Any, name: str, where: str) -> tuple[list[JsonObject], list[JsonObject]]:
    passages, questions = [], []
    _check(raw, {"title": str, "paragraphs": list}, where)
    title = urllib.parse.unquote(raw["title"]).replace("_", " ")
    for i, paragraph in enumerate(raw["paragraphs"]):
        here = f"{where}.paragraphs[{i}]"
        _check(paragraph, {"context": str, "qas": list}, here)
        passage = {"id": f"squad-{name}-{i}", "title": title, "text": paragraph["context"].strip()}
        if not passage["text"]:  # an empty paragraph has no answer
            continue
        passages.append(passage)
        for j, asked in enumerate(paragraph["qas"]):
            _check(asked, {"id": str, "question": str, "answers": list}, f"{here}.qas[{j}]")
            for answer in asked["answers"]:
                _check(answer, {"text": str}, f"{here}.qas[{j}].answers")
            answers = list(dict.fromkeys(a["text"] for a in asked["answers"] if a["text"].strip()))
            if not answers or not asked["question"].strip():
                continue
            questions.append(
                {
                    "id": asked["id"],
                    "question": asked["question"].strip(),
                    "answers": answers,
                    "title": title,
                    "gold": [passage["id"]],
                }
            )
    return passages, questions


def _check(raw: Any, fields: FieldTypes, where: str) -> None:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object, found a {type(raw).__name__}")
    check_fields(raw, fields, {}, where)


def _passages(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    for path in paths:
        for passages, _ in _articles(path, rows):
            yield passages


def _questions(dev: bool | None) -> Read:
    """Questions of the dev articles, of the other articles, or (None) of all."""

    def read(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
        for number, (_, questions) in enumerate(_articles(paths[0], rows)):
            is_dev = number % _DEV_EVERY == _DEV_EVERY - 1
            yield questions if dev in (None, is_dev) else ()

    return read


_TRAIN, _DEV = "train-v1.1.json", "dev-v1.1.json"
_ARTICLES = {_TRAIN: 442, _DEV: 48}  # number of articles
SQUAD = Dataset(
    name="squad",
    about="SQuAD 1.1, its paragraphs as the corpus (SQuAD-open)",
    where=(f"https://rajpurkar.github.io/SQuAD-explorer/ ({_TRAIN}, {_DEV})",),
    parts=(
        Part("passages.jsonl", (_TRAIN, _DEV), sum(_ARTICLES.values()), _passages),
        Part("train.jsonl", (_TRAIN,), _ARTICLES[_TRAIN], _questions(dev=False)),
        Part("dev.jsonl", (_TRAIN,), _ARTICLES[_TRAIN], _questions(dev=True)),
        Part("test.jsonl", (_DEV,), _ARTICLES[_DEV], _questions(dev=None)),
    ),
)
