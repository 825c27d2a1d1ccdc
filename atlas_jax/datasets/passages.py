"""Wikipedia passages: DPR's 100-word ones, and those of KILT's knowledge source."""

import csv
import re
import sys
from collections.abc import Sequence

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import FieldTypes, JsonObject, check_fields, parse_record
from atlas_jax.datasets.convert import ByLine, Dataset, Part

WORDS = 100  # of a passage of KILT's pages, at most

_HEADING = re.compile(r"Section::::(?P<name>.*?)\.?\s*$")
_BULLET = re.compile(r"^BULLET::::(?:- )?")
_KILT_FIELDS: FieldTypes = {"wikipedia_id": (str, int), "wikipedia_title": str, "text": list}


def _dpr_rows(line: str, where: str) -> Sequence[JsonObject] | None:
    csv.field_size_limit(sys.maxsize)
    try:
        row = next(csv.reader([f"{line}\n"], delimiter="\t"))
    except csv.Error as error:
        raise UserError(f"{where}: {error}") from error
    return None if row == ["id", "text", "title"] else [_dpr_passage(row, where)]


def _dpr_passage(row: list[str], where: str) -> JsonObject:
    if any("\n" in value for value in row):
        raise UserError(f"{where}: a quotation mark that is not closed joins several rows to one")
    if len(row) != 3:
        raise UserError(f"{where}: {len(row)} columns where id, text and title were expected")
    for name, value in zip(("id", "text"), row, strict=False):
        if not value.strip():
            raise UserError(f"{where}: column {name!r} is empty")
    return {"id": row[0], "title": row[2], "text": row[1]}


def _kilt_rows(line: str, where: str) -> Sequence[JsonObject]:
    page = parse_record(line.encode("utf-8"), where)
    check_fields(page, _KILT_FIELDS, {}, where)
    if not all(isinstance(text, str) for text in page["text"]):
        raise UserError(f"{where}: field 'text' must hold texts")
    return page_passages(str(page["wikipedia_id"]), page["wikipedia_title"], page["text"])


def page_passages(page_id: str, title: str, paragraphs: Sequence[str]) -> list[JsonObject]:
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
    passages: list[JsonObject] = []
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
        Part("passages.jsonl", ("psgs_w100.tsv.gz",), 21_015_324, ByLine(_dpr_rows)),
        Part("passages.jsonl", ("psgs_w100.tsv",), 21_015_324, ByLine(_dpr_rows)),
    ),
)
KILT_WIKIPEDIA = Dataset(
    name="kilt_wikipedia",
    about="KILT's knowledge source, Wikipedia of August 2019 (arXiv 2009.02252)",
    where=("http://dl.fbaipublicfiles.com/KILT/kilt_knowledgesource.json",),
    parts=(Part("passages.jsonl", ("kilt_knowledgesource.json",), 5_903_530, ByLine(_kilt_rows)),),
)
