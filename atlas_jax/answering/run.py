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


@dataclass(frozen=True)
class IndexRun:
    """The settings of `build_index`."""

    models: ModelSpec
    corpus: CorpusSpec
    devices: Devices = Devices()


@dataclass(frozen=True)
class RetrieveRun:
    """The settings of `retrieve`.

    Attributes:
      retrieve: the questions, and the file for the passages found.
      task: makes the queries.
      recall_at: the k of recall@k; values above ``retrieve.k`` are left out.
      rows: what happens to a broken line of the question file.
    """

    models: ModelSpec
    corpus: CorpusSpec
    retrieve: RetrieveConfig
    task: Task
    data: DataConfig = DataConfig()
    recall_at: tuple[int, ...] = EvalConfig().recall_at
    rows: RowsConfig = RowsConfig()
    devices: Devices = Devices()


@dataclass(frozen=True)
class AnswerRun:
    """The settings of `evaluate` and `ask`, and of the evaluation of a training run.

    Attributes:
      evaluation: the questions, and what is done with them.
      task: reads the lines of the question file.
      rows: what happens to a broken line of it.
    """

    models: ModelSpec
    corpus: CorpusSpec
    evaluation: EvalConfig
    task: Task
    read: ReadConfig = ReadConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    rows: RowsConfig = RowsConfig()
    devices: Devices = Devices()
