"""Wikipedia passages: DPR's 100-word ones, and those of KILT's knowledge source."""

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import BrokenRows, RowsConfig, read_jsonl, text_lines
from atlas_jax.datasets.convert import Dataset, Part, Row, single

WORDS = 100  # of a passage of KILT's pages, at most

_HEADING = re.compile(r"Section::::(?P<name>.*?)\.?\s*$")
_BULLET = re.compile(r"^BULLET::::(?:- )?")


def _dpr(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[Row]]:
    return single(_dpr_rows(paths[0], rows))


def _dpr_rows(path: Path, rows: RowsConfig) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    broken = BrokenRows(path, rows)
    lines = csv.reader(text_lines(path), delimiter="\t")
    try:
        for row in lines:
            if row == ["id", "text", "title"]:
                continue
            try:
                yield _dpr_passage(row, f"{path}:{lines.line_num}")
            except UserError as error:
                broken.take(error)
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num + 1}: cannot read on: {error}") from error
    broken.tell()


def _dpr_passage(row: list[str], where: str) -> Row:
    if len(row) != 3:
        raise UserError(f"{where}: {len(row)} columns where id, text and title were expected")
    for name, value in zip(("id", "text"), row, strict=False):
        if not value.strip():
            raise UserError(f"{where}: column {name!r} is empty")
    if any("\n" in value for value in row):
        raise UserError(f"{where}: a quotation mark that is not closed joins several rows to one")
    return {"id": row[0], "title": row[2], "text": row[1]}


def _kilt(paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[Row]]:
    fields: Any = {"wikipedia_id": (str, int), "wikipedia_title": str, "text": list}
    for _, page in read_jsonl(paths[0], fields, None, _check_text(paths[0]), rows):
        yield page_passages(str(page["wikipedia_id"]), page["wikipedia_title"], page["text"])


def _check_text(path: Path) -> Any:
    def check(number: int, page: Row) -> None:
        if not all(isinstance(text, str) for text in page["text"]):
            raise UserError(f"{path}:{number}: field 'text' must hold texts")

    return check


def page_passages(page_id: str, title: str, paragraphs: Sequence[str]) -> list[Row]:
    """Passages of up to `WORDS` words of one section each; their ids are `page_id:number`.

    Args:
      paragraphs: as KILT has them: the title first, headings as `Section::::Name.`, items
        as `BULLET::::- text`.
    """
    sections: list[tuple[str, list[str]]] = [("", [])]
    for number, paragraph in enumerate(paragraphs):
        text = _BULLET.sub("", paragraph.strip())
        heading = _HEADING.match(text)
        if heading:
            sections.append((heading["name"].replace(":", " - "), []))
        elif text and not (number == 0 and text == title):
            sections[-1][1].extend(text.split())
    passages: list[Row] = []
    for section, words in sections:
        for start in range(0, len(words), WORDS):
            passages.append(
                {
                    "id": f"{page_id}:{len(passages)}",
                    "title": title,
                    "section": section,
                    "text": " ".join(words[start : start + WORDS]),
                }
            )
    return passages


_DPR_URL = "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz"
WIKIPEDIA = Dataset(
    name="wikipedia",
    about="Wikipedia of December 2018 in 100-word passages (arXiv 2004.04906)",
    where=(_DPR_URL,),
    parts=(
        Part("passages.jsonl", ("psgs_w100.tsv.gz",), 21_015_324, _dpr),
        Part("passages.jsonl", ("psgs_w100.tsv",), 21_015_324, _dpr),
    ),
)
KILT_WIKIPEDIA = Dataset(
    name="kilt_wikipedia",
    about="KILT's knowledge source, Wikipedia of August 2019 (arXiv 2009.02252)",
    where=("http://dl.fbaipublicfiles.com/KILT/kilt_knowledgesource.json",),
    parts=(Part("passages.jsonl", ("kilt_knowledgesource.json",), 5_903_530, _kilt),),
)
