"""The settings of the answering commands: one value for each run."""

from dataclasses import dataclass

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig, RetrieveConfig
from atlas_jax.core.devices import Devices
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.corpus.config import CorpusSpec, ReadConfig
from atlas_jax.models.config import ModelSpec
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """The settings of every run."""

    models: ModelSpec
    corpus: CorpusSpec
    devices: Devices = Devices()


@dataclass(frozen=True, kw_only=True)
class IndexRun(BaseRun):
    """The settings of `build_index`."""


@dataclass(frozen=True, kw_only=True)
class QuestionRun(BaseRun):
    """The settings of a run about questions.

    Attributes:
      task: what a line of the question file means; it makes the queries.
      data: lengths of queries.
      rows: what happens to a broken line of the question file.
    """

    task: Task
    data: DataConfig = DataConfig()
    rows: RowsConfig = RowsConfig()


@dataclass(frozen=True, kw_only=True)
class RetrieveRun(QuestionRun):
    """The settings of `retrieve`.

    Attributes:
      retrieve: the questions, and the file for the passages found.
      recall_at: the k of recall@k; values above ``retrieve.k`` are left out.
    """

    retrieve: RetrieveConfig
    recall_at: tuple[int, ...] = EvalConfig().recall_at


@dataclass(frozen=True, kw_only=True)
class AnswerRun(QuestionRun):
    """The settings of `evaluate` and `ask`, and of the evaluation of a training run.

    Attributes:
      evaluation: the questions, and what is done with them.
      read: passages per question, and how much of each.
      generation: how answers are decoded.
    """

    evaluation: EvalConfig
    read: ReadConfig = ReadConfig()
    generation: GenerationConfig = GenerationConfig()
