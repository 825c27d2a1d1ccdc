"""What the commands of answering are told: one value for each run."""

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
    """What `build_index` is told."""

    models: ModelSpec
    corpus: CorpusSpec
    devices: Devices = Devices()


@dataclass(frozen=True)
class RetrieveRun:
    """What `retrieve` is told.

    Attributes:
      retrieve: which questions, and where the passages found go.
      task: forms the queries.
      recall_at: the k of recall@k; those beyond ``retrieve.k`` are left out.
      rows: what becomes of a broken line of the question file.
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
    """What `evaluate` and `ask` are told, and the evaluation of a training run.

    Attributes:
      evaluation: which questions, and what is done with them.
      task: what a line of their file means.
      rows: what becomes of a broken line of it.
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
