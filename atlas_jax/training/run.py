"""The settings of a training run: one value for each kind of run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.answering.defaults import Fields, defaults_of, fields_of
from atlas_jax.answering.run import AnswerRun, BaseRun
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.index.staleness import StalenessConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import ModelSpec
from atlas_jax.models.expects import Asking, Expects, wording_of
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.retriever.contrastive import ContrastiveConfig
from atlas_jax.tasks.base import Task
from atlas_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    ProfileConfig,
    RetrieverTrainConfig,
    StepConfig,
    TrainConfig,
)


def asking_of(task: Task, data: DataConfig) -> Asking:
    """How a task is asked in a run, for those who ask the trained models."""
    return Asking(
        wording=wording_of(task),
        query_length=data.query_length,
        retriever_query_length=data.retriever_query_length,
        target_length=data.target_length,
        prompt_length=data.prompt_length,
    )


def retrieves(train: TrainConfig, evaluation: EvalConfig) -> bool:
    """Whether the retriever reads anything, in training or its evaluation."""
    sources = {train.passages, evaluation.passages if evaluation.file else "none"}
    return sources != {"none"}


@dataclass(frozen=True, kw_only=True)
class TrainingRun(BaseRun):
    """The settings of both kinds of training.

    Attributes:
      rows: what happens to a broken line of the data files.
      text: all settings as a gin file, which is kept with the run.
    """

    data: DataConfig = DataConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    rows: RowsConfig = RowsConfig()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainRun(TrainingRun):
    """The settings of `train`.

    Attributes:
      task: reads the lines of ``train.file``.
      optimizers: of the models, 'reader' and 'retriever'.
      evaluation, eval_task: of the evaluations during training; none without a file.
    """

    train: TrainConfig
    task: Task
    eval_task: Task
    step: StepConfig = StepConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizers: Mapping[str, OptimizerConfig] = field(
        default_factory=lambda: dict.fromkeys(PARTS, OptimizerConfig())
    )
    refresh: RefreshPolicy = RefreshPolicy()
    staleness: StalenessConfig = StalenessConfig()
    evaluation: EvalConfig = EvalConfig()
    generation: GenerationConfig = GenerationConfig()

    @classmethod
    def from_folder(
        cls,
        model: str | os.PathLike[str],
        train: TrainConfig,
        corpus: CorpusConfig = CorpusConfig(),
        *,
        task: Task | None = None,
        formats: StoreConfig | Fields | None = None,
        step: StepConfig | Fields | None = None,
        data: DataConfig | Fields | None = None,
        generation: GenerationConfig | Fields | None = None,
        evaluation: EvalConfig = EvalConfig(),
        **others: Any,
    ) -> "TrainRun":
        """A run that trains the models of a folder, and reads as the folder says.

        What ``formats``, ``step``, ``data`` and ``generation`` tell otherwise counts instead: a
        dict of some fields, or a whole config.

        Args:
          model: the folder.
          train: what is trained on, how long, and where it is written.
          corpus: which passages are searched.
          task: None = that of ``train.task``, in the wording of the folder.
          evaluation: which questions are asked on the way.
          others: further fields of `TrainRun`.

        Raises:
          UserError: the folder is none, or a length that the retriever cannot read.
        """
        spec = ModelSpec.of_folder(model)
        defaults = defaults_of(spec, train.task, retrieves(train, evaluation))
        evaluated = task if evaluation.task == train.task else None
        return cls(
            **{"eval_task": evaluated or defaults.task(evaluation.task, {}), **others},
            train=train,
            task=task or defaults.task(train.task, {}),
            models=spec,
            corpus=CorpusSpec(corpus, defaults.store(fields_of(formats, StoreConfig, "formats"))),
            step=defaults.read(StepConfig, fields_of(step, StepConfig, "step")),
            data=defaults.data(fields_of(data, DataConfig, "data")),
            generation=defaults.generation(fields_of(generation, GenerationConfig, "generation")),
            evaluation=evaluation,
        )

    @property
    def refreshes_index(self) -> bool:
        """Whether the index is ever embedded anew."""
        return self.refresh.refreshes or self.staleness.refresh_below > 0

    @property
    def searches(self) -> bool:
        """Whether training or its evaluation searches an index."""
        asked = bool(self.evaluation.file) and self.evaluation.passages == "index"
        return self.train.passages == "index" or asked

    def taught(self, before: Expects, store: StoreConfig | None) -> Expects:
        """What the trained models expect.

        Args:
          before: what those that the run began with expect.
          store: how the searched passages were read; None where none were searched.
        """
        if self.train.passages == "file":
            store = self.corpus.formats
        asked = {self.task.name: asking_of(self.task, self.data)}
        return before.taught(store, self.step.reader_length, asked)

    @property
    def answers(self) -> AnswerRun:
        """The settings of its evaluations."""
        return AnswerRun(
            models=self.models,
            corpus=self.corpus,
            evaluation=self.evaluation,
            task=self.eval_task,
            read=self.step,
            data=self.data,
            generation=self.generation,
            rows=self.rows,
            devices=self.devices,
        )


@dataclass(frozen=True, kw_only=True)
class RetrieverRun(TrainingRun):
    """The settings of `train_retriever`.

    Attributes:
      task: reads the lines of ``train.file``; None if pairs are crops of passages.
    """

    train: RetrieverTrainConfig
    task: Task | None = None
    contrastive: ContrastiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def taught(self, before: Expects, store: StoreConfig) -> Expects:
        """What the trained retriever expects; see `TrainRun.taught`."""
        asked = {self.task.name: asking_of(self.task, self.data)} if self.task else {}
        return before.taught(store, tasks=asked).half("retriever")
