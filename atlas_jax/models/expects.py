"""What the models of a folder expect to read: wording, formats and lengths.

A model reads well what looks like its training data. So a model folder says how that looked, and
a command takes it from there unless it is told otherwise.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import whole_config

Config = TypeVar("Config")

_OF_RETRIEVER = "retriever_"  # begins the name of what the retriever sees; the reader sees the rest
_TEXT = (str, tuple)
_Types = Mapping[str, type | tuple[type, ...]]
_ASKING: _Types = {
    "query_length": int,
    "retriever_query_length": int,
    "target_length": int,
    "prompt_length": int,
}
_EXPECTS: _Types = {
    "reader_format": _TEXT,
    "retriever_format": _TEXT,
    "reader_length": int,
    "retriever_length": int,
    "text_length": int,
}


@dataclasses.dataclass(frozen=True)
class Asking:
    """How the queries and targets of one task look; None is what nobody said.

    Attributes:
      wording: the task's format strings by the names of its fields, such as `query_format`.
      query_length: reader tokens of a query.
      retriever_query_length: retriever tokens of a query.
      target_length: reader tokens of a target.
      prompt_length: reader tokens of the decoder's prompt.
    """

    wording: Mapping[str, str] = dataclasses.field(default_factory=dict)
    query_length: int | None = None
    retriever_query_length: int | None = None
    target_length: int | None = None
    prompt_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Expects:
    """What a reader and a retriever expect; None is what nobody said.

    Attributes:
      reader_format, retriever_format: of a passage, see `StoreConfig`.
      reader_length, retriever_length: tokens of a passage.
      text_length: reader tokens of query and passage together.
      tasks: by its name, how each task was asked that the models were trained for.
    """

    reader_format: str | tuple[str, ...] | None = None
    retriever_format: str | tuple[str, ...] | None = None
    reader_length: int | None = None
    retriever_length: int | None = None
    text_length: int | None = None
    tasks: Mapping[str, Asking] = dataclasses.field(default_factory=dict)

    @property
    def store(self) -> dict[str, Any]:
        """Fields of `StoreConfig`."""
        return _said(self, _EXPECTS, leave_out=("text_length",))

    @property
    def reading(self) -> dict[str, Any]:
        """Fields of `ReadConfig` and `StepConfig`."""
        return {} if self.text_length is None else {"reader_length": self.text_length}

    def lengths(self, task: str) -> dict[str, Any]:
        """Fields of `DataConfig`, for a task of this name."""
        return _said(self.tasks.get(task, Asking()), _ASKING)

    def generation(self, task: str) -> dict[str, Any]:
        """Fields of `GenerationConfig`, for a task of this name."""
        lengths = self.lengths(task)
        return {"max_length": lengths["target_length"]} if "target_length" in lengths else {}

    def wording(self, task: str) -> dict[str, Any]:
        """Fields of the task of this name."""
        return dict(self.tasks.get(task, Asking()).wording)

    def taught(
        self,
        store: StoreConfig | None = None,
        text_length: int | None = None,
        tasks: Mapping[str, Asking] | None = None,
    ) -> "Expects":
        """What models expect that were trained on from these; None is as before.

        Args:
          store: how the passages were read.
          text_length: see `Expects`.
          tasks: for which they were trained; the others stay.
        """
        passages = self.store if store is None else dataclasses.asdict(store)
        return Expects(
            **passages,
            text_length=text_length or self.text_length,
            tasks={**self.tasks, **(tasks or {})},
        )

    def half(self, part: str) -> "Expects":
        """What the 'reader' or the 'retriever' of the two expects."""
        return combined(*(self if part == one else Expects() for one in PARTS))


NOTHING = Expects()


def combined(reader: Expects, retriever: Expects) -> Expects:
    """What the reader of one pair and the retriever of another expect."""
    names = dict.fromkeys((*reader.tasks, *retriever.tasks))
    tasks = {}
    for name in names:
        read, found = reader.tasks.get(name, Asking()), retriever.tasks.get(name, Asking())
        wording = {k: v for k, v in read.wording.items() if not k.startswith(_OF_RETRIEVER)}
        wording |= {k: v for k, v in found.wording.items() if k.startswith(_OF_RETRIEVER)}
        tasks[name] = Asking(wording, **_halves(read, found, _ASKING))
    tasks = {name: asking for name, asking in tasks.items() if asking != Asking()}
    return Expects(**_halves(reader, retriever, _EXPECTS), tasks=tasks)


def settled(
    config: type[Config],
    expected: Mapping[str, Any],
    told: Mapping[str, Any],
    most: int | None = None,
) -> Config:
    """A config: each field as it was told, or else as it is expected, or else its default.

    Args:
      config: a dataclass.
      expected: fields that a model folder gives, see `Expects`.
      told: fields that a person has set.
      most: tokens that the retriever can read. A default or expected length of what it reads is
        cut to it.

    Raises:
      UserError: a value that the config refuses, a length beyond `most` that was told, or a
        field without any value; each names the binding. Or the folder gives a field that the
        config has not.
    """
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(expected) - known)
    if unknown:
        raise UserError(
            f"the model folder says {', '.join(unknown)} of {config.__name__}, which has no such "
            "field; it was written by another version"
        )
    made = whole_config(config, {**expected, **told})
    for name in ("retriever_length", "retriever_query_length"):
        value = getattr(made, name, None)
        if most is None or value is None or value <= most:
            continue
        if name in told:
            raise UserError(
                f"{config.__name__}.{name} = {value}, but the retriever can read {most} tokens "
                f"(its max_positions); bind {config.__name__}.{name} to {most} or less"
            )
        made = dataclasses.replace(made, **{name: most})  # type: ignore[type-var]
    return made


def wording_of(task: Any) -> dict[str, str]:
    """The format strings of a task, by the names of its fields."""
    if not dataclasses.is_dataclass(task):
        return {}
    names = [field.name for field in dataclasses.fields(task) if field.name.endswith("_format")]
    return {name: getattr(task, name) for name in names}


def to_json(expects: Expects) -> dict[str, Any]:
    """What stands in a model folder's config.json; `from_json` reads it."""
    tasks = {
        name: {"wording": dict(asking.wording), **_said(asking, _ASKING)}
        for name, asking in expects.tasks.items()
    }
    return {**_said(expects, _EXPECTS), **({"tasks": tasks} if tasks else {})}


def from_json(value: Any, where: str) -> Expects:
    """Read what `to_json` wrote.

    Raises:
      UserError: begins with `where`; names the field that is unknown or of another type.
    """
    tasks = {}
    fields = _checked(value, {**_EXPECTS, "tasks": dict}, where)
    for name, asking in fields.pop("tasks", {}).items():
        place = f"{where}: tasks: {name}"
        lengths = _checked(asking, {**_ASKING, "wording": dict}, place)
        wording = lengths.pop("wording", {})
        tasks[name] = Asking(_checked(wording, dict.fromkeys(wording, str), place), **lengths)
    try:
        made = Expects(**fields, tasks=tasks)
        StoreConfig(**made.store)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return made


def _said(one: Any, names: _Types, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    values = {name: getattr(one, name) for name in names if name not in leave_out}
    return {name: value for name, value in values.items() if value is not None}


def _halves(reader: Any, retriever: Any, names: _Types) -> dict[str, Any]:
    return {
        name: getattr(retriever if name.startswith(_OF_RETRIEVER) else reader, name)
        for name in names
    }


def _checked(value: Any, types: _Types, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object of fields")
    # Several formats: JSON has no tuples.
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    for name, given in fields.items():
        if name not in types:
            raise UserError(f"{where}: unknown field {name!r}; it was written by another version")
        if not isinstance(given, types[name]) or isinstance(given, bool):
            raise UserError(f"{where}: field {name!r} cannot be {given!r}")
        if isinstance(given, int) and given < (0 if name == "prompt_length" else 1):
            raise UserError(f"{where}: field {name!r} cannot be {given}")
        if isinstance(given, tuple) and not all(isinstance(one, str) for one in given):
            raise UserError(f"{where}: field {name!r} must hold texts alone")
    return fields
