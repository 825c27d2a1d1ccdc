"""FEVER, MMLU, KILT's tasks, and any data set in BEIR's layout."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import BrokenRows, JsonObject, RowsConfig, read_jsonl, text_lines
from atlas_jax.datasets.convert import Dataset, Part, filled, single


def _fever(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    fields: Any = {"id": int, "claim": str}

    def check(number: int, raw: JsonObject) -> None:
        filled(raw["claim"], f"{paths[0]}:{number}: field 'claim'")

    return single(
        {"id": str(raw["id"]), "claim": raw["claim"]}
        | ({"label": raw["label"]} if raw.get("label") else {})
        for _, raw in read_jsonl(paths[0], fields, {"label": str}, check, rows)
    )


FEVER = Dataset(
    name="fever",
    about="FEVER's claims (arXiv 1803.05355)",
    where=("https://fever.ai/dataset/fever.html",),
    parts=(
        Part("train.jsonl", ("train.jsonl",), 145_449, _fever),
        Part("dev.jsonl", ("shared_task_dev.jsonl",), 19_998, _fever),
        Part("test.jsonl", ("shared_task_test.jsonl",), 19_998, _fever),
        Part("paper_dev.jsonl", ("paper_dev.jsonl",), 9_999, _fever),
        Part("paper_test.jsonl", ("paper_test.jsonl",), 9_999, _fever),
    ),
)


_GRADE = re.compile(r"\s*-?[0-9]{1,9}\s*")


def _mmlu(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    for path in paths:
        split = path.parent.name
        subject = path.stem.removesuffix(f"_{split}")
        broken = BrokenRows(path, rows)
        lines = csv.reader(text_lines(path))
        try:
            for number, row in enumerate(lines):
                try:
                    yield (_mmlu_row(row, f"mmlu-{subject}-{split}-{number:04d}", subject,
                                     f"{path}:{lines.line_num}"),)  # fmt: skip
                except UserError as error:
                    broken.take(error)
        except csv.Error as error:
            raise UserError(f"{path}:{lines.line_num + 1}: cannot read on: {error}") from error
        broken.tell()


def _mmlu_row(row: list[str], row_id: str, subject: str, where: str) -> JsonObject:
    if len(row) != 6 or row[5] not in tuple("ABCD"):
        raise UserError(
            f"{where}: expected six columns: the question, four options and a letter from A to D"
        )
    for name, text in zip(("the question", *"ABCD"), row, strict=False):
        if not text.strip():
            raise UserError(f"{where}: the column of {name} is empty")
    options = dict(zip("ABCD", row[1:5], strict=True))
    return {"id": row_id, "question": row[0], "options": options, "answer": row[5],
            "subject": subject}  # fmt: skip


MMLU = Dataset(
    name="mmlu",
    about="MMLU, 57 subjects (arXiv 2009.03300)",
    where=("https://people.eecs.berkeley.edu/~hendrycks/data.tar (unpack it; give its data/)",),
    parts=(
        Part("five_shot.jsonl", ("dev/*_dev.csv",), 285, _mmlu),
        Part("valid.jsonl", ("val/*_val.csv",), 1_531, _mmlu),
        Part("test.jsonl", ("test/*_test.csv",), 14_042, _mmlu),
        Part("auxiliary_train.jsonl", ("auxiliary_train/*.csv",), 99_842, _mmlu),
    ),
)

# Lines of each published file, from the table in KILT's README.
_KILT_ROWS = {
    "fever-train": 104_966, "fever-dev": 10_444, "fever-test_without_answers": 10_100,
    "nq-train": 87_372, "nq-dev": 2_837, "nq-test_without_answers": 1_444,
    "hotpotqa-train": 88_869, "hotpotqa-dev": 5_600, "hotpotqa-test_without_answers": 5_569,
    "triviaqa-train_id": 61_844, "triviaqa-dev_id": 5_359,
    "triviaqa-test_id_without_answers": 6_586,
    # As KILT's own script names them, once it has filled the questions in.
    "triviaqa-train": 61_844, "triviaqa-dev": 5_359, "triviaqa-test_without_answers": 6_586,
    "eli5-train": 272_634, "eli5-dev": 1_507, "eli5-test_without_answers": 600,
    "trex-train": 2_284_168, "trex-dev": 5_000, "trex-test_without_answers": 5_000,
    "structured_zeroshot-train": 147_909, "structured_zeroshot-dev": 3_724,
    "structured_zeroshot-test_without_answers": 4_966,
    "aidayago2-train": 18_395, "aidayago2-dev": 4_784, "aidayago2-test_without_answers": 4_463,
    "wned-dev": 3_396, "wned-test_without_answers": 3_376,
    "cweb-dev": 5_599, "cweb-test_without_answers": 5_543,
    "wow-train": 63_734, "wow-dev": 3_054, "wow-test_without_answers": 2_944,
}  # fmt: skip


def _kilt(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    """The rows as they are, for `kilt` reads them; checked, without what nothing reads."""
    fields: Any = {"id": (str, int), "input": str}

    def check(number: int, raw: JsonObject) -> None:
        if not raw["input"].strip():
            raise UserError(
                f"{paths[0]}:{number}: field 'input' is empty: KILT publishes TriviaQA without its "
                "questions. Its scripts/get_triviaqa_input.py fills them in and writes "
                "triviaqa-train-kilt.jsonl and the like, which are read here"
            )

    return single(
        {name: raw[name] for name in ("id", "input", "output", "meta") if name in raw}
        for _, raw in read_jsonl(paths[0], fields, {"output": list, "meta": dict}, check, rows)
    )


KILT = Dataset(
    name="kilt",
    about="the tasks of KILT (arXiv 2009.02252)",
    where=("https://github.com/facebookresearch/KILT#kilt-catalogue (NAME-kilt.jsonl)",),
    parts=tuple(
        Part(f"{name}.jsonl", (f"{name}-kilt.jsonl",), rows, _kilt)
        for name, rows in _KILT_ROWS.items()
    ),
    looks_like="*-kilt.jsonl",
)


def _beir_corpus(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    fields: Any = {"_id": (str, int), "text": str}
    for _, raw in read_jsonl(paths[0], fields, {"title": str}, rows=rows):
        title, text = raw.get("title") or "", raw["text"]
        # A document may be empty in BEIR; a passage may not. Its title stands in.
        kept = {"id": str(raw["_id"]), "title": title, "text": text if text.strip() else title}
        yield (kept,) if kept["text"].strip() else ()


def _beir_queries(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    grades = _qrels(paths[1], rows)
    fields: Any = {"_id": (str, int), "text": str}
    for _, raw in read_jsonl(paths[0], fields, rows=rows):
        judged = grades.get(str(raw["_id"]), {})
        # As in BEIR, a query without a relevant document is not asked.
        asked = any(grade > 0 for grade in judged.values())
        row = {"id": str(raw["_id"]), "question": raw["text"], "qrels": judged}
        yield (row,) if asked and raw["text"].strip() else ()


def _qrels(path: Path, rows: RowsConfig) -> dict[str, dict[str, int]]:
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    broken = BrokenRows(path, rows)
    for number, line in enumerate(text_lines(path), start=1):
        fields = line.rstrip("\r\n").split("\t")
        if number == 1 and fields[0] == "query-id":
            continue
        try:
            query, passage, grade = fields
            if not _GRADE.fullmatch(grade):
                raise ValueError(grade)
            grades[query][passage] = int(grade)
        except ValueError:
            wanted = "query, passage and a whole number, with tabs between"
            broken.take(UserError(f"{path}:{number}: expected {wanted}"))
    broken.tell()
    return grades


BEIR = Dataset(
    name="beir",
    about="a retrieval benchmark in BEIR's layout (arXiv 2104.08663)",
    where=("https://github.com/beir-cellar/beir#available-datasets (unpack one; give its folder)",),
    parts=(
        Part("passages.jsonl", ("corpus.jsonl",), None, _beir_corpus),
        *(
            Part(f"{split}.jsonl", ("queries.jsonl", f"qrels/{split}.tsv"), None, _beir_queries)
            for split in ("train", "dev", "test")
        ),
    ),
)
