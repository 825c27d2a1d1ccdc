"""Natural Questions (open), TriviaQA (unfiltered) and TempLAMA."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.jsonl import BrokenRows, JsonObject, RowsConfig, check_fields, read_jsonl
from atlas_jax.core.paths import input_file
from atlas_jax.datasets.convert import Dataset, Part, Read, filled, single, texts

_CHUNK = 1 << 20  # characters read at a time


def _nq_rows(path: Path, rows: RowsConfig) -> Iterator[JsonObject]:
    def check(number: int, raw: JsonObject) -> None:
        filled(raw["question"], f"{path}:{number}: field 'question'")
        texts(raw["answer"], f"{path}:{number}: field 'answer'")

    for number, raw in read_jsonl(path, {"question": str, "answer": list}, None, check, rows):
        split = path.name.split(".")[1]
        yield {
            "id": f"nq-{split}-{number - 1}",
            "question": raw["question"],
            "answers": texts(raw["answer"], str(path)),
            "place": number - 1,
        }


def _trivia_rows(path: Path, rows: RowsConfig) -> Iterator[JsonObject]:
    split, broken = path.stem.rpartition("-")[2], BrokenRows(path, rows)
    for number, raw in enumerate(stream_list(path, "Data")):
        where = f"{path}: Data[{number}]"
        try:
            check_fields(raw, {"Question": str, "Answer": dict}, {"QuestionId": str}, where)
            answer = raw["Answer"]
            check_fields(answer, {"Value": str, "Aliases": list}, {}, f"{where}.Answer")
            filled(raw["Question"], f"{where}.Question")
            answers = texts([*answer["Aliases"], answer["Value"]], f"{where}.Answer")
        except UserError as error:
            broken.take(error)
            continue
        value = answer["Value"] if answer["Value"].strip() else answers[0]
        # Upper case only shows how the quiz was typed; Atlas learns answers in title case.
        yield {
            "id": str(raw.get("QuestionId") or f"trivia-{split}-{number}"),
            "question": raw["Question"],
            "answers": answers,
            "target": value.title() if value.isupper() else value,
            "place": number,
        }
    broken.tell()


def stream_list(path: Path, key: str) -> Iterator[Any]:
    """The members of the list under `key` of a file that is one JSON object, one by one.

    Raises:
      UserError: there is no such list, or it is broken; names the character.
    """
    decoder, buffer, read = json.JSONDecoder(), "", 0
    with _text_of(path) as file:
        while f'"{key}"' not in buffer and (more := file.read(_CHUNK)):
            buffer = buffer[-len(key) - 2 :] + more
            read += len(more)
        buffer = buffer.partition(f'"{key}"')[2].lstrip(" \n\r\t:")
        if not buffer.startswith("["):
            raise UserError(f"{path}: there is no list {key!r} in it")
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip(" \n\r\t,")
            if buffer.startswith("]"):
                return
            try:
                _, end = decoder.raw_decode(buffer)
            except RecursionError:
                raise UserError(f"{path}: lists and objects lie in each other too deep") from None
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK)
                if not more:
                    at = read - len(buffer) + error.pos
                    raise UserError(f"{path}: not JSON at character {at}: {error.msg}") from None
                buffer += more
                read += len(more)
                continue
            except ValueError as error:  # for example a number with thousands of digits
                raise UserError(f"{path}: {one_line(error)}") from None
            yield strict_json.parse(buffer[:end].encode("utf-8"), f"{path}: one of {key!r}")
            buffer = buffer[end:]


@contextlib.contextmanager
def _text_of(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to read from, without a byte order mark.

    Raises:
      UserError: it is not UTF-8; raised when the block reads the faulty part.
    """
    with input_file(path).open(encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(
                f"{path}: not UTF-8 (the byte 0x{byte:02x}); convert the file to UTF-8"
            ) from None


def _whole(read_rows: Any) -> Read:
    return lambda paths, rows: single(_public(row) for row in read_rows(paths[0], rows))


def _chosen(read_rows: Any) -> Read:
    """The rows of the first file whose numbers are in the second one, a JSON list."""

    def read(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
        places: set[int] = set(strict_json.read(paths[1], list[int]))
        for row in read_rows(paths[0], rows):
            yield (_public(row),) if row["place"] in places else ()

    return read


def _public(row: JsonObject) -> JsonObject:
    """The row without its number in the published file, which is only needed for choosing."""
    return {name: value for name, value in row.items() if name != "place"}


_INDEX = (
    "https://dl.fbaipublicfiles.com/FiD/data/dataindex.tar.gz (*.idx.json, which rows of the "
    "train file are train and dev; a list of your own as *.64shot.idx.json chooses 64)"
)
NQ = Dataset(
    name="nq",
    about="Natural Questions, open (arXiv 1906.00300)",
    where=(
        "https://github.com/google-research-datasets/natural-questions/tree/master/nq_open "
        "(NQ-open.train.jsonl, NQ-open.dev.jsonl)",
        _INDEX,
    ),
    parts=(
        Part("test.jsonl", ("NQ-open.dev.jsonl",), 3_610, _whole(_nq_rows)),
        Part("train_and_dev.jsonl", ("NQ-open.train.jsonl",), 87_925, _whole(_nq_rows)),
        Part("train.jsonl", ("NQ-open.train.jsonl", "NQ.train.idx.json"), 87_925,
             _chosen(_nq_rows)),
        Part("dev.jsonl", ("NQ-open.train.jsonl", "NQ.dev.idx.json"), 87_925, _chosen(_nq_rows)),
        Part("train_64shot.jsonl", ("NQ-open.train.jsonl", "NQ.64shot.idx.json"), 87_925,
             _chosen(_nq_rows)),
    ),
)  # fmt: skip
TRIVIAQA = Dataset(
    name="triviaqa",
    about="TriviaQA, unfiltered (arXiv 1705.03551)",
    where=(
        "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz "
        "(unfiltered-web-train.json, unfiltered-web-dev.json)",
        _INDEX,
    ),
    parts=(
        Part("test.jsonl", ("unfiltered-web-dev.json",), 11_313, _whole(_trivia_rows)),
        Part("train_and_dev.jsonl", ("unfiltered-web-train.json",), 87_622, _whole(_trivia_rows)),
        Part("train.jsonl", ("unfiltered-web-train.json", "TQA.train.idx.json"), 87_622,
             _chosen(_trivia_rows)),
        Part("dev.jsonl", ("unfiltered-web-train.json", "TQA.dev.idx.json"), 87_622,
             _chosen(_trivia_rows)),
        Part("train_64shot.jsonl", ("unfiltered-web-train.json", "TQA.64shot.idx.json"), 87_622,
             _chosen(_trivia_rows)),
    ),
)  # fmt: skip

TEMPLAMA_YEARS = ("2017", "2020")


def _templama(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    """Rows for `temporal`: queries of both years, with both years' answers.

    As in Atlas, a fact has changed if the two years have no answer in common.
    """
    waiting: dict[str, dict[str, list[str]]] = {}
    fields = {"query": str, "answer": list, "date": str}
    check = _check_names(paths[0])
    for _, raw in read_jsonl(paths[0], fields, {"id": str}, check, rows):
        if raw["date"] not in TEMPLAMA_YEARS:
            yield ()
            continue
        years = waiting.setdefault(raw["query"], {})
        years[raw["date"]] = [answer["name"] for answer in raw["answer"]]
        if len(years) < len(TEMPLAMA_YEARS):
            yield ()
            continue
        before, after = (years[year] for year in TEMPLAMA_YEARS)
        yield (
            {
                "question": raw["query"].replace("_X_", "<extra_id_0>"),
                **{f"answers_{year}": list(dict.fromkeys(years[year])) for year in TEMPLAMA_YEARS},
                "changed": not set(before) & set(after),
            },
        )


def _check_names(path: Path) -> Any:
    def check(number: int, raw: JsonObject) -> None:
        named = [one.get("name") if isinstance(one, dict) else None for one in raw["answer"]]
        if not all(isinstance(name, str) and name.strip() for name in named) or not named:
            raise UserError(f"{path}:{number}: field 'answer' must hold objects with a 'name'")
        filled(raw["query"], f"{path}:{number}: field 'query'")

    return check


TEMPLAMA = Dataset(
    name="templama",
    about=f"TempLAMA, the years {' and '.join(TEMPLAMA_YEARS)} (arXiv 2106.15110)",
    where=tuple(
        f"https://storage.googleapis.com/gresearch/templama/{split}.json"
        for split in ("train", "val", "test")
    ),
    parts=tuple(
        Part(f"{name}.jsonl", (f"{split}.json",), None, _templama)
        for name, split in (("train", "train"), ("dev", "val"), ("test", "test"))
    ),
)
