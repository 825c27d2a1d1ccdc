"""Write a run that was made from configs as a gin file that repeats it."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from atlas_jax.models.config import ModelSpec


def as_gin(run: Any) -> str:
    """Bindings of every config of a run, such as `TrainRun`, one a line.

    The gin file imports the module of a user's own task; that module must register the task.
    """
    lines = list(dict.fromkeys(_lines(run)))
    imports = [line for line in lines if line.startswith("import ")]
    return "\n".join([*imports, *(line for line in lines if line not in imports)]) + "\n"


def _lines(value: Any) -> Iterator[str]:
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if isinstance(inner, ModelSpec):
            yield from _bindings(inner.config)
            yield from (f"ReaderConfig.{name} = {one!r}" for name, one in inner.reader.items())
            yield from (
                f"RetrieverConfig.{name} = {one!r}" for name, one in inner.retriever.items()
            )
            for part, config in inner.deltas.items():
                yield from _bindings(config, f"{part}/")
        elif field.name == "optimizers":
            for part, config in inner.items():
                yield from _bindings(config, f"{part}/")
        elif field.name in ("optimizer", "delta"):
            without = getattr(value, "DECIDED", ()) if field.name == "optimizer" else ()
            yield from _bindings(inner, f"{getattr(value, 'SCOPE', 'retriever')}/", without)
        elif field.name == "encoder":
            yield from (f"EncoderModelConfig.{name} = {one!r}" for name, one in inner.items())
        elif dataclasses.is_dataclass(inner):
            nested = [getattr(inner, one.name) for one in dataclasses.fields(inner)]
            if nested and all(map(dataclasses.is_dataclass, nested)):
                yield from _lines(inner)
            else:
                yield from _bindings(inner)


def _bindings(config: Any, scope: str = "", without: Collection[str] = ()) -> Iterator[str]:
    name, module = type(config).__name__, type(config).__module__
    if not module.startswith("atlas_jax."):
        yield f"import {module}"
    for field in dataclasses.fields(config):
        if field.name in without:
            continue
        yield f"{scope}{name}.{field.name} = {getattr(config, field.name)!r}"
