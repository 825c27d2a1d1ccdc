"""Tasks by name."""

from collections.abc import Callable
from typing import Any, TypeVar

from atlas_jax.core.errors import UserError, nearest
from atlas_jax.tasks.base import BaseTask, Task
from atlas_jax.tasks.boolq import BoolQTask
from atlas_jax.tasks.classification import CLASSIFICATION
from atlas_jax.tasks.cloze import ClozeTask
from atlas_jax.tasks.denoise import BartTask, MassTask
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.tasks.kilt import KILTTask
from atlas_jax.tasks.lm import LMTask
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.tasks.ranking import RankingTask
from atlas_jax.tasks.section import SectionTask
from atlas_jax.tasks.sentences import SentencesTask
from atlas_jax.tasks.temporal import TemporalTask

Made = TypeVar("Made", bound=Callable[[], Any])

_KNOWN: tuple[Any, ...] = (
    BaseTask,
    QATask,
    MultipleChoiceTask,
    FeverTask,
    BoolQTask,
    KILTTask,
    TemporalTask,
    RankingTask,
    MLMTask,
    LMTask,
    SectionTask,
    BartTask,
    MassTask,
    ClozeTask,
    SentencesTask,
    *CLASSIFICATION,
)
TASKS: dict[str, Callable[[], Task]] = {task.name: task for task in _KNOWN}


def register(task: Made) -> Made:
    """A decorator that registers a task under its `name`.

    Raises:
      UserError: another task has this name.
    """
    made: Any = task
    known: Any = TASKS.setdefault(made.name, made)
    if known.__qualname__ != made.__qualname__:
        raise UserError(f"a task is called {made.name!r} already: {known.__qualname__}")
    return task


def task_class(name: str) -> Callable[[], Task]:
    """The class of the task with this name.

    Raises:
      UserError: there is no such task; names the nearest one.
    """
    if name not in TASKS:
        raise UserError(f"no task is called {name!r}{nearest(name, TASKS)}")
    return TASKS[name]
