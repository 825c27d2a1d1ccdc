"""Classification sets: GLUE's tables, LM-BFF's and LiST's copies of them, and their own sites.

GLUE's tables have tabs between and no quoting. LM-BFF's k-shot folders have the same columns; there
`test.tsv` is GLUE's dev set with its labels. LM-BFF's copies of MR, CR, MPQA, Subj and TREC are
tables of a number and a text, with commas between.
"""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import (
    BrokenRows,
    JsonObject,
    RowsConfig,
    raw_lines,
    read_jsonl,
    text_lines,
)
from atlas_jax.datasets.convert import Dataset, Part, Read, filled

_Columns = Mapping[str, str]  # our field -> the table's column


@dataclasses.dataclass(frozen=True)
class _Table:
    """A task's table with tabs between.

    Attributes:
      name: of the task; ids begin with it.
      columns: our text fields -> the table's columns.
      label: the column of the label; the table of a test set may lack it.
      labels: the table's labels -> ours; a row with another is broken.
      no_label: labels that say that the annotators did not agree; such rows are left out.
      unnamed: names of the columns where no line names them; () = the first line does.
    """

    name: str
    columns: _Columns
    label: str
    labels: Mapping[str, str]
    no_label: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()

    def read(self, paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
        """The rows of one table; see `convert.Read`."""
        path = paths[0]
        broken, names, count = BrokenRows(path, rows), list(self.unnamed), 0
        for number, line in enumerate(text_lines(path), start=1):
            cells = line.rstrip("\r\n").split("\t")
            if number == 1 and set(self.columns.values()) <= set(cells):
                names = cells
                continue
            if not names:
                wanted = ", ".join(self.columns.values())
                raise UserError(f"{path}:{number}: expected a line that names the columns {wanted}")
            try:
                row = self._row(names, cells, f"{path}:{number}")
            except UserError as error:
                broken.take(error)
                continue
            yield ({"id": f"{self.name}-{path.stem}-{count}", **row},) if row else ()
            count += 1
        broken.tell()

    def _row(self, names: Sequence[str], values: Sequence[str], where: str) -> JsonObject:
        cells = dict(zip(names, values, strict=False))
        for column in (*self.columns.values(), self.label):
            if column in names and column not in cells:
                raise UserError(f"{where}: the row ends before its column {column!r}")
        row = {
            field: filled(cells[column].strip(), f"{where}: column {column!r}")
            for field, column in self.columns.items()
        }
        if self.label not in names:
            return row
        found = cells[self.label].strip()
        if found in self.no_label:
            return {}
        return {**row, "label": _known(found, self.labels, f"{where}: column {self.label!r}")}


def _known(found: str, labels: Mapping[str, str], where: str) -> str:
    if found not in labels:
        raise UserError(f"{where} is {found!r}, expected one of {', '.join(map(repr, labels))}")
    return labels[found]


def _numbered(name: str, labels: Sequence[str]) -> Read:
    """LM-BFF's tables of the number of a label and a text."""
    known = {str(number): label for number, label in enumerate(labels)}

    def read(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
        path, broken = paths[0], BrokenRows(paths[0], rows)
        lines = csv.reader(text_lines(path))
        try:
            for count, cells in enumerate(lines):
                where = f"{path}:{lines.line_num}"
                try:
                    if len(cells) != 2:
                        raise UserError(f"{where}: expected two columns, a number and a text")
                    label = _known(cells[0].strip(), known, f"{where}: the label")
                    text = filled(cells[1].strip(), f"{where}: the text")
                except UserError as error:
                    broken.take(error)
                    continue
                yield ({"id": f"{name}-{path.stem}-{count}", "text": text, "label": label},)
        except csv.Error as error:
            raise UserError(f"{path}:{lines.line_num + 1}: cannot read on: {error}") from error
        broken.tell()

    return read


def _trec(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    """TREC's own files: `DESC:manner How did serfdom develop ...`, in Latin-1."""
    path, broken = paths[0], BrokenRows(paths[0], rows)
    for number, raw in raw_lines(path):
        where = f"{path}:{number}"
        kind, _, text = raw.decode("latin-1").strip().partition(" ")
        try:
            label = _known(kind.partition(":")[0], dict(zip(_TREC, _TREC, strict=True)), where)
            filled(text, f"{where}: the question")
        except UserError as error:
            broken.take(error)
            continue
        yield ({"id": f"trec-{path.stem}-{number - 1}", "text": text, "label": label},)
    broken.tell()


def _snli(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
    """SNLI's own files; lines without an agreed label are left out, as everywhere."""
    names: Any = dict.fromkeys(("sentence1", "sentence2", "gold_label"), str)

    def check(number: int, raw: JsonObject) -> None:
        if raw["gold_label"] != "-":
            _known(raw["gold_label"], _ENTAILMENT, f"{paths[0]}:{number}: field 'gold_label'")

    for number, raw in read_jsonl(paths[0], names, {}, check, rows):
        row = {
            "id": f"snli-{paths[0].stem}-{number - 1}", "premise": raw["sentence1"],
            "hypothesis": raw["sentence2"], "label": raw["gold_label"],
        }  # fmt: skip
        yield (row,) if raw["gold_label"] != "-" else ()


_TREC = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
_ENTAILMENT = {name: name for name in ("contradiction", "neutral", "entailment")}
_FOLLOWS = {name: name for name in ("not_entailment", "entailment")}
_SENTENCES = {"premise": "sentence1", "hypothesis": "sentence2"}
_GLUE = "https://gluebenchmark.com/tasks ({} as it is unpacked; a k-shot folder of LM-BFF or LiST)"
_LM_BFF = "https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar (its folder original/{})"


def _glue(
    table: _Table, about: str, folder: str, counts: Mapping[str, int | None], *more: Part
) -> Dataset:
    """A data set of tables; `counts` are the published rows of each, by its name's stem."""
    parts = tuple(
        Part(f"{stem}.jsonl", (f"{stem}.tsv",), rows, table.read) for stem, rows in counts.items()
    )
    return Dataset(table.name, about, (_GLUE.format(folder),), (*parts, *more))


def _lm_bff(
    name: str, about: str, labels: Sequence[str], train: int, test: int, *more: Part
) -> Dataset:
    read = _numbered(name, labels)
    parts = tuple(
        Part(f"{stem}.jsonl", (f"{stem}.csv",), rows, read)
        for stem, rows in (("train", train), ("dev", None), ("test", test))
    )
    where = [_LM_BFF.format(name)]
    if more:
        where.append("https://cogcomp.seas.upenn.edu/Data/QA/QC (train_5500.label, TREC_10.label)")
    return Dataset(name, about, tuple(where), (*parts, *more))


_SST2 = _Table("sst2", {"text": "sentence"}, "label", {"0": "negative", "1": "positive"})
_COLA = _Table(
    "cola", {"text": "sentence"}, "label", {"0": "unacceptable", "1": "acceptable"},
    unnamed=("source", "label", "star", "sentence"),
)  # fmt: skip
_MNLI = _Table("mnli", _SENTENCES, "gold_label", _ENTAILMENT, no_label=("-",))
_SNLI = dataclasses.replace(_MNLI, name="snli")
_RTE = _Table("rte", _SENTENCES, "label", _FOLLOWS)
_QNLI = _Table("qnli", {"question": "question", "sentence": "sentence"}, "label", _FOLLOWS)
_QQP = _Table(
    "qqp", {"a": "question1", "b": "question2"}, "is_duplicate",
    {"0": "not_duplicate", "1": "duplicate"},
)  # fmt: skip
_MRPC = _Table(
    "mrpc", {"a": "#1 String", "b": "#2 String"}, "Quality",
    {"0": "not_equivalent", "1": "equivalent"},
)  # fmt: skip
_POLARITY = ("negative", "positive")

CLASSIFICATION = (
    _glue(_SST2, "SST-2, sentiment of sentences (GLUE)", "SST-2",
          {"train": 67_349, "dev": 872, "test": 1_821}),
    _lm_bff("mr", "MR, sentiment of film reviews", _POLARITY, 8_662, 2_000),
    _lm_bff("cr", "CR, sentiment of customers' reviews", _POLARITY, 1_775, 2_000),
    _lm_bff("mpqa", "MPQA, polarity of phrases", _POLARITY, 8_606, 2_000),
    _lm_bff("subj", "Subj, opinions and facts", ("subjective", "objective"), 8_000, 2_000),
    _lm_bff("trec", "TREC, kinds of questions", _TREC, 5_452, 500,
            Part("train.jsonl", ("train_5500.label",), 5_452, _trec),
            Part("test.jsonl", ("TREC_10.label",), 500, _trec)),
    _glue(_COLA, "CoLA, grammatical sentences (GLUE)", "CoLA",
          {"train": 8_551, "dev": 1_043, "test": 1_063}),
    _glue(_MNLI, "MNLI, entailment (GLUE)", "MNLI",
          {"train": 392_702, "dev_matched": 9_815, "dev_mismatched": 9_832,
           "test_matched": 9_796, "test_mismatched": 9_847}),
    Dataset(
        name="snli", about="SNLI, entailment of captions (arXiv 1508.05326)",
        where=("https://nlp.stanford.edu/projects/snli/snli_1.0.zip (snli_1.0_*.jsonl)",
               _LM_BFF.format("SNLI")),
        parts=(
            Part("train.jsonl", ("snli_1.0_train.jsonl",), 550_152, _snli),
            Part("dev.jsonl", ("snli_1.0_dev.jsonl",), 10_000, _snli),
            Part("test.jsonl", ("snli_1.0_test.jsonl",), 10_000, _snli),
            *(Part(f"{stem}.jsonl", (f"{stem}.tsv",), None, _SNLI.read)
              for stem in ("train", "dev", "test")),
        ),
    ),
    _glue(_RTE, "RTE, entailment (GLUE)", "RTE", {"train": 2_490, "dev": 277, "test": 3_000}),
    _glue(_QNLI, "QNLI, sentences that answer (GLUE)", "QNLI",
          {"train": 104_743, "dev": 5_463, "test": 5_463}),
    # The published table has a few rows that end early, so a number is not known.
    _glue(_QQP, "QQP, questions that ask the same (GLUE)", "QQP",
          {"train": None, "dev": None, "test": None}),
    _glue(_MRPC, "MRPC, sentences that say the same (GLUE)", "MRPC",
          {"train": 3_668, "dev": 408, "test": 1_725},
          Part("train_and_dev.jsonl", ("msr_paraphrase_train.txt",), 4_076, _MRPC.read),
          Part("test_with_labels.jsonl", ("msr_paraphrase_test.txt",), 1_725, _MRPC.read)),
)  # fmt: skip
