"""Settings that nobody gave: taken from the model folders, else the configs' defaults."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.errors import UserError, nearest
from atlas_jax.corpus.config import ReadConfig
from atlas_jax.index.store_files import LONGEST, StoreConfig
from atlas_jax.models.assembly import expectations, readable
from atlas_jax.models.config import ModelSpec
from atlas_jax.models.expects import NOTHING, Expects, settled
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.base import Task
from atlas_jax.tasks.registry import task_class

Config = TypeVar("Config")
AnyRead = TypeVar("AnyRead", bound=ReadConfig)
Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How the models of a run read unless a setting says otherwise; made by `defaults_of`.

    Each method gives a config of the fields that were told and of what is expected otherwise. It
    raises a `UserError` for a value that the config refuses and for a length that the retriever
    cannot read; the field is named.

    Attributes:
      expects: what the model folders say.
      most: tokens that the retriever can read; None where it reads nothing.
      task_name: of the task whose queries have the lengths.
    """

    expects: Expects
    most: int | None
    task_name: str = ""

    def store(self, told: Fields) -> StoreConfig:
        """Formats and lengths of passages."""
        made = settled(StoreConfig, self.expects.store, told, self.most)
        return made.fitted(LONGEST if self.most is None else self.most)

    def read(self, config: type[AnyRead], told: Fields) -> AnyRead:
        """How much of the passages is read: a `ReadConfig`, or a `StepConfig`."""
        return settled(config, self.expects.reading, told)

    def data(self, told: Fields) -> DataConfig:
        """Lengths of queries and targets."""
        return settled(DataConfig, self.expects.lengths(self.task_name), told, self.most)

    def generation(self, told: Fields) -> GenerationConfig:
        """How answers are decoded."""
        return settled(GenerationConfig, self.expects.generation(self.task_name), told)

    def task(self, name: str, told: Fields) -> Task:
        """The task of this name, in the wording that the models were trained with.

        Raises:
          UserError: there is none.
        """
        found: Any = task_class(name)
        has_fields = dataclasses.is_dataclass(found)  # one of somebody's own may have none
        made: Task = settled(found, self.expects.wording(name), told) if has_fields else found()
        return made


def defaults_of(spec: ModelSpec, task_name: str = "", retrieves: bool = True) -> Defaults:
    """How these models read.

    Args:
      task_name: of the task whose queries are read; "" where none are.
      retrieves: whether the retriever reads anything.

    Raises:
      UserError: a folder that is none.
    """
    return Defaults(expectations(spec.config), readable(spec) if retrieves else None, task_name)


def fields_of(told: Any, config: type[Config], argument: str) -> Fields:
    """The fields that a caller in Python has set, in a dict or as a whole config.

    Args:
      told: a whole config, some of its fields by name, or None for none of them.
      config: its class.
      argument: what it is called, for the error.

    Raises:
      UserError: the config has no such field; or it is no config at all.
    """
    if told is None:
        return {}
    if isinstance(told, config):
        return {field.name: getattr(told, field.name) for field in dataclasses.fields(told)}  # type: ignore[arg-type]
    if not isinstance(told, Mapping):
        raise UserError(
            f"{argument}: expected a {config.__name__}, or a dict of some of its fields; "
            f"got a {type(told).__name__}"
        )
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in told:
        if name not in known:
            hint = nearest(str(name), known)
            raise UserError(f"{argument}: {config.__name__} has no field {name!r}{hint}")
    return told


def checked_formats(spec: ModelSpec, formats: StoreConfig, data: DataConfig) -> StoreConfig:
    """The formats of a run with each length as a number, before anything is built.

    Raises:
      UserError: a length that the retriever cannot read; names the field and the longest.
    """
    defaults = Defaults(NOTHING, readable(spec))
    defaults.data(fields_of(data, DataConfig, "data"))
    return defaults.store(fields_of(formats, StoreConfig, "formats"))
