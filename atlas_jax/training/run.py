"""The settings of a training run: one value for each kind of run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core.devices import Devices
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.config import CorpusSpec
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.index.staleness import StalenessConfig
from atlas_jax.models.config import ModelSpec
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.retriever.contrastive import ContrastiveConfig
from atlas_jax.tasks.base import Task
from atlas_jax.training.config import (
    CheckpointConfig,
    RetrieverTrainConfig,
    StepConfig,
    TrainConfig,
)
from atlas_jax.training.optimizers import OptimizerConfig
from atlas_jax.training.speed import ProfileConfig


@dataclass(frozen=True)
class TrainRun:
    """The settings of `train`.

    Attributes:
      task: reads the lines of ``train.file``.
      optimizers: of the models, 'reader' and 'retriever'.
      evaluation, eval_task: of the evaluations during training; none without a file.
      rows: what happens to a broken line of the data files.
      text: all settings as a gin file, which is kept with the run.
    """

    train: TrainConfig
    task: Task
    models: ModelSpec
    corpus: CorpusSpec
    eval_task: Task
    step: StepConfig = StepConfig()
    data: DataConfig = DataConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizers: Mapping[str, OptimizerConfig] = field(
        default_factory=lambda: dict.fromkeys(PARTS, OptimizerConfig())
    )
    refresh: RefreshPolicy = RefreshPolicy()
    staleness: StalenessConfig = StalenessConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    evaluation: EvalConfig = EvalConfig()
    generation: GenerationConfig = GenerationConfig()
    rows: RowsConfig = RowsConfig()
    devices: Devices = Devices()
    text: str = ""

    @property
    def refreshes_index(self) -> bool:
        """Whether the index is ever embedded anew."""
        return self.refresh.refreshes or self.staleness.refresh_below > 0

    @property
    def searches(self) -> bool:
        """Whether training or its evaluation searches an index."""
        asked = bool(self.evaluation.file) and self.evaluation.passages == "index"
        return self.train.passages == "index" or asked

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


@dataclass(frozen=True)
class RetrieverRun:
    """The settings of `train_retriever`.

    Attributes:
      task: reads the lines of ``train.file``; None if pairs are crops of passages.
      text: as in `TrainRun`.
    """

    train: RetrieverTrainConfig
    models: ModelSpec
    corpus: CorpusSpec
    task: Task | None = None
    data: DataConfig = DataConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    rows: RowsConfig = RowsConfig()
    devices: Devices = Devices()
    text: str = ""
