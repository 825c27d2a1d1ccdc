"""The page of every gin configurable: its fields, types, defaults and the docstring's words."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from atlas_jax.from_gin import CONFIGURABLES

INTRODUCTION = """# Gin configurables

Everything that a gin file or `--gin.NAME.field=value` may bind, in alphabetical order. The page is
made from the code. [Configuration](../configuration.md) says how bindings are written.

"""
REQUIRED = "required"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # msgspec's words for bounds


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configurable."""

    name: str
    type: str
    default: str
    words: str


@dataclasses.dataclass(frozen=True)
class Configurable:
    """A class or function that gin may bind.

    Attributes:
      name: as a gin file writes it.
      module: where it is defined.
      words: its docstring without the fields.
    """

    name: str
    module: str
    words: str
    fields: tuple[Field, ...]


def configurables() -> list[Configurable]:
    """All that gin may bind, by name."""
    return sorted(map(_described, CONFIGURABLES), key=lambda one: one.name.lower())


def page(found: list[Configurable]) -> str:
    """The page in Markdown."""
    return INTRODUCTION + "\n".join(line for one in found for line in _section(one))


def _described(one: Any) -> Configurable:
    words, said = _docstring(one)
    fields = tuple(
        Field(
            parameter.name,
            _type(parameter.annotation),
            REQUIRED if parameter.default is parameter.empty else repr(parameter.default),
            said.get(parameter.name, ""),
        )
        for parameter in inspect.signature(one).parameters.values()
    )
    return Configurable(one.__name__, one.__module__, words, fields)


def _type(annotation: Any) -> str:
    """A type as `int`, with its bounds as `int ≥ 1, ≤ 512`."""
    text = inspect.formatannotation(annotation)
    for bounded, plain, limits in re.findall(
        r"(typing\.Annotated\[(\w+), msgspec\.Meta\((.*?)\)\])", text
    ):
        pairs = (limit.split("=") for limit in limits.split(", "))
        signs = ", ".join(f"{SIGNS[name]} {bound}" for name, bound in pairs)
        text = text.replace(bounded, f"{plain} {signs}")
    return re.sub(r"\b(?:typing|collections\.abc|atlas_jax(?:\.\w+)*)\.", "", text)


def _docstring(one: Any) -> tuple[str, dict[str, str]]:
    """The words before the fields, and those of each field, a parent's where it has none."""
    parents = one.__mro__[1:-1] if inspect.isclass(one) else ()
    said = {name: words for parent in reversed(parents) for name, words in _fields(parent)}
    said |= dict(_fields(one))
    names = "|".join(inspect.signature(one).parameters)
    text = inspect.getdoc(one) or ""
    before = re.split(rf"(?m)^ *(?:(?:Attributes|Args):$|(?:{names})(?:, \w+)*: )", text)[0]
    return before.strip(), said


def _fields(one: Any) -> Iterator[tuple[str, str]]:
    """Each field that a docstring explains as `name: words` or `name, name: words`."""
    names = set(inspect.signature(one).parameters)
    told: list[str] = []
    words: list[str] = []
    depth = 0
    for line in [*(inspect.getdoc(one) or "").splitlines(), "end"]:
        found = re.match(r"( *)(\w+(?:, \w+)*): +(.*)", line)
        indent = len(line) - len(line.lstrip())
        begins = bool(found) and set(found[2].split(", ")) <= names
        if line.strip() and (begins or indent <= depth):
            yield from ((name, " ".join(words)) for name in told)
            told, words = (found[2].split(", "), [found[3]]) if begins else ([], [])
            depth = indent
        elif told:
            words.append(line.strip())


def _section(one: Configurable) -> list[str]:
    lines = [f"## {one.name}", "", f"`{one.module}`", "", _markdown(one.words), ""]
    if one.fields:
        lines += ["| field | type | default | |", "|---|---|---|---|"]
    lines += [
        f"| `{field.name}` | {_code(field.type)} | {_default(field.default)} "
        f"| {_cell(field.words)} |"
        for field in one.fields
    ]
    return [*lines, ""]


def _default(text: str) -> str:
    return f"**{text}**" if text == REQUIRED else _code(text)


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _cell(words: str) -> str:
    return _markdown(words).replace("|", "&#124;")


def _markdown(words: str) -> str:
    """A docstring's words: double back quotes as single ones, nothing taken for HTML."""
    parts = re.split(r"(`[^`]*`)", words.replace("``", "`"))
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", r"\*")
        for part in parts
    )


def _escaped(text: str) -> str:
    marks = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "*": "&#42;", "_": "&#95;"}
    return "".join(marks.get(mark, mark) for mark in text)
