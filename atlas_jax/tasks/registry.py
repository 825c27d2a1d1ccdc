"""Tasks by name."""

from collections.abc import Callable

from atlas_jax.core.errors import UserError, nearest
from atlas_jax.tasks.base import BaseTask, Task
from atlas_jax.tasks.cloze import ClozeTask
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.tasks.kilt import KILTTask
from atlas_jax.tasks.lm import LMTask
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.tasks.ranking import RankingTask
from atlas_jax.tasks.section import SectionTask
from atlas_jax.tasks.temporal import TemporalTask

TASKS: dict[str, Callable[[], Task]] = {
    task.name: task
    for task in (
        BaseTask,
        QATask,
        MultipleChoiceTask,
        FeverTask,
        KILTTask,
        TemporalTask,
        RankingTask,
        MLMTask,
        LMTask,
        SectionTask,
        ClozeTask,
    )
}


def get_task(name: str) -> Task:
    """The task of this name, as gin configures it.

    Raises:
      UserError: there is none; the nearest name is told.
    """
    if name not in TASKS:
        raise UserError(f"no task is called {name!r}{nearest(name, TASKS)}")
    return TASKS[name]()
