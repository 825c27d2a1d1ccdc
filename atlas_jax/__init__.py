"""Atlas in JAX: retrieval-augmented few-shot learning, retrieval in the training loop.

    atlas = atlas_jax.load("work/run/final", passages="passages.jsonl")
    answer = atlas.ask("Who designed it?", k=8, explain=True)
    print(answer.text, answer.passages[0].title)

`load` gives an `Atlas`, which answers, searches and scores; `train` runs a `TrainRun`;
`build_index` prepares passages. Configs are in the packages that they are of, such as
`atlas_jax.training.config`. Errors that input can cause are `UserError`s.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_jax.answering.atlas import Atlas
    from atlas_jax.answering.results import Answer, Evaluated, Passage
    from atlas_jax.core.errors import UserError
    from atlas_jax.face import (
        Trained,
        build_index,
        change_index,
        compact_index,
        load,
        train,
    )
    from atlas_jax.training.run import TrainRun

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Atlas",
    "Evaluated",
    "Passage",
    "TrainRun",
    "Trained",
    "UserError",
    "build_index",
    "change_index",
    "compact_index",
    "load",
    "train",
]

# Where each name lies. It is imported when it is used, so that `atlas-jax --help` answers at once.
_HOMES = {
    "Answer": "answering.results",
    "Atlas": "answering.atlas",
    "Evaluated": "answering.results",
    "Passage": "answering.results",
    "TrainRun": "training.run",
    "Trained": "face",
    "UserError": "core.errors",
    "build_index": "face",
    "change_index": "face",
    "compact_index": "face",
    "load": "face",
    "train": "face",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atlas_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"atlas_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `atlas_jax.train` the function, also once the command of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
