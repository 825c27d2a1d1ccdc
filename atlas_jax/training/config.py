"""The settings of a training run: frozen dataclasses that gin fills.

An empty string means "not given".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError, one_of, require
from atlas_jax.corpus.config import PASSAGE_SOURCES, ReadConfig
from atlas_jax.models.parameters import RetrieverTraining

# Files and folders in a run's model_dir, beside metrics.METRICS_FILE and tensorboard/.
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.gin"
FINAL = "final"  # the model folder
INDEX = "index"  # embeddings that the run made, one folder a version
FINAL_INDEX = "final_index"  # by the passage tower of FINAL, if the index was refreshed
PREDICTIONS = "predictions"


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
      every: steps between checkpoints; 0 = only after the last step.
      keep: number of checkpoints that are kept.
    """

    every: bounds.Every = 0
    keep: bounds.AtLeast1 = 2

    def __post_init__(self) -> None:
        bounds.check(self)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    model_dir: folder for checkpoints, metrics, the final config and `final/` (the model folder). A
        run that is started again in the same folder continues from its last checkpoint.
    task, file: the task's name and its training file.
    passages: 'index' (retrieve), 'file' (given in the data file), 'none' (closed book).
    total_steps: training ends after this step.
    seed: decides initial parameters, data order and dropout.
    log_every: steps between two lines of metrics.
    eval_every: steps between evaluations on `EvalConfig.file` (0 = only after the last step).

    RefreshPolicy and StalenessConfig decide when the index is refreshed.
    """

    model_dir: str
    file: str
    total_steps: bounds.AtLeast1
    task: str = "qa"
    passages: str = "index"
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 10
    eval_every: bounds.Every = 0

    def __post_init__(self) -> None:
        bounds.check(self)
        require(bool(self.model_dir), "TrainConfig.model_dir", self.model_dir, "a directory")
        require(bool(self.file), "TrainConfig.file", self.file, "a data file")
        require(
            self.passages in PASSAGE_SOURCES,
            "TrainConfig.passages",
            self.passages,
            one_of(PASSAGE_SOURCES),
        )


@dataclass(frozen=True)
class RetrieverTrainConfig:
    """One run of contrastive pretraining, on the passages of `CorpusConfig`.

    model_dir: as in TrainConfig; `final/` holds the retriever alone.
    total_steps: training ends after this step.
    batch_size: pairs per step.
    task, file: a task whose queries are paired with their gold passage, such as `cloze` on
        the passages themselves. "" = each pair is two crops of one passage.
    group: number of neighbouring records of the file that stay in one batch, as hard negatives of
        each other (for example passages of one title). Must divide batch_size.
    hard_negatives: number of a record's `negatives` that are drawn as hard negatives of its query
        (RetrieveConfig.negatives writes such records). Needs a task.
    seed: decides initial parameters, data order, crops and dropout.
    log_every: steps between two lines of metrics.
    """

    model_dir: str
    total_steps: bounds.AtLeast1
    batch_size: bounds.BatchSize = 64
    task: str = ""
    file: str = ""
    group: bounds.AtLeast1 = 1
    hard_negatives: bounds.AtLeast0 = 0
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 50

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        name = "RetrieverTrainConfig"
        bounds.check(self)
        require(bool(self.model_dir), f"{name}.model_dir", self.model_dir, "a directory")
        require(
            self.batch_size % self.group == 0,
            f"{name}.group",
            self.group,
            f"a divisor of {name}.batch_size = {self.batch_size}",
        )
        require(
            self.hard_negatives == 0 or bool(self.task),
            f"{name}.hard_negatives",
            self.hard_negatives,
            "0, or more with a task",
        )
        require(bool(self.task) == bool(self.file), f"{name}.file", self.file, "given with a task")

    @property
    def passages_in_batch(self) -> int:
        """A gold passage and the hard negatives for each query."""
        return self.batch_size * (1 + self.hard_negatives)


@dataclass(frozen=True)
class StepConfig(ReadConfig):
    """What one step does; `ReadConfig` says how it reads.

    Attributes:
      retriever_training: ``joint`` trains both towers, ``query_side`` the query tower
        alone (the index never goes stale), ``fixed`` neither.
      train: patterns of the paths that train (``reader/*/adapter/*``, ``*layer_norm*``), of what
        `retriever_training` lets train; () = each part's adapters or LoRA alone where it has
        some, and else all of it.
      accumulate: microbatches per step; the gradients are those of the whole batch.
      clip: how OptimizerConfig.clip_norm bounds gradients. ``apart``: those of the reader and of
        the retriever by their own norms. ``together``: both by the norm of the two as one
        vector.
      reads: pairs (rows, k). The first rows of a batch read their k best passages, the next rows
        theirs, and so on; so one step teaches with few passages and with many. The rows add up
        to the batch and no k is above ``k``. () = all rows read ``k``.
    """

    retriever_training: RetrieverTraining = "query_side"
    train: Sequence[str] = ()
    accumulate: bounds.AtLeast1 = 1
    clip: Literal["apart", "together"] = "apart"
    reads: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          UserError: names the field and what it may be.
        """
        super().__post_init__()
        require(
            not isinstance(self.train, str),
            "StepConfig.train",
            self.train,
            "a list of patterns, such as ['reader/*/lora/*']",
        )
        object.__setattr__(self, "train", tuple(self.train))
        require(
            self.retriever_training in ("joint", "query_side", "fixed"),
            "StepConfig.retriever_training",
            self.retriever_training,
            "'joint', 'query_side' or 'fixed'",
        )
        object.__setattr__(self, "reads", tuple((rows, k) for rows, k in self.reads))
        require(
            all(rows >= 1 and 1 <= k <= self.k for rows, k in self.reads),
            "StepConfig.reads",
            self.reads,
            f"pairs (rows, k) with k from 1 to StepConfig.k = {self.k}",
        )
        require(
            not self.reads or self.accumulate == 1,
            "StepConfig.accumulate",
            self.accumulate,
            "1 with StepConfig.reads",
        )
        require(
            not self.reads or self.packed_rows <= 0,
            "StepConfig.packed_rows",
            self.packed_rows,
            "0 with StepConfig.reads",
        )
        require(
            not self.reads or self.packed_passages <= 0,
            "StepConfig.packed_passages",
            self.packed_passages,
            "0 with StepConfig.reads",
        )

    @property
    def embeds_passages(self) -> bool:
        """Whether a step runs the passage tower; the index then holds the tokens for it."""
        return self.retriever_training == "joint" or self.rerank > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser. Gin scopes tell the two apart: ``reader/OptimizerConfig.learning_rate``.

    Attributes:
      kind: ``adamw``, ``adafactor`` or ``lamb`` (as ALBERT was trained: `optimizers._by_layer`).
      learning_rate: peak rate, reached after ``warmup_steps``.
      warmup_steps: number of steps in which the rate rises linearly.
      warmup_from: share of the peak at which the warm-up begins. With 0 its first step changes
        nothing.
      frozen_steps: number of first steps that change neither parameters nor moments. The warm-up
        begins after them.
      schedule: ``linear`` or ``cosine`` fall to ``fall_to`` at ``total_steps``, or ``constant``.
      cosine_wave: shape of ``cosine``. The ``half`` wave is level at both ends and halfway down
        at half time. The ``quarter`` wave falls faster and faster.
      fall_to: share of the peak at which ``linear`` and ``cosine`` end; the rate stays there.
      total_steps: length of the schedule in optimiser steps, frozen ones and warm-up included.
      weight_decay: decoupled weight decay of the parameters that ``decayed`` names.
      decayed: ``weights`` (kernels and embeddings, but no norms, biases or position tables), or
        ``all`` parameters.
      clip_norm: largest global norm of the gradient; 0 switches clipping off. StepConfig.clip
        says which gradient.
      b1, b2: AdamW's decay of the first and of the second moment.
      epsilon: AdamW's; added to the root of the second moment.
      delta_rate: learning rate of adapters, LoRA, prompts and prefixes, as a multiple of
        ``learning_rate``; weight decay follows it. For runs in which the model trains beside them.
        P-tuning has 10 (PT-Fewshot/pet/wrapper.py: two optimisers, at 1e-4 and at 1e-5).
    """

    kind: Literal["adamw", "adafactor", "lamb"] = "adamw"
    learning_rate: bounds.NotNegative = 4e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    cosine_wave: Literal["half", "quarter"] = "half"
    fall_to: bounds.Share = 0.0
    warmup_steps: bounds.AtLeast0 = 0
    warmup_from: bounds.Share = 0.0
    frozen_steps: bounds.AtLeast0 = 0
    total_steps: bounds.AtLeast0 = 1000
    weight_decay: bounds.NotNegative = 0.01
    decayed: Literal["weights", "all"] = "weights"
    clip_norm: bounds.NotNegative = 1.0
    b1: bounds.BelowOne = 0.9
    b2: bounds.BelowOne = 0.999
    epsilon: bounds.NotNegative = 1e-8
    delta_rate: bounds.Positive = 1.0

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
          UserError: names the field and what it may be.
        """
        bounds.check(self)
        if not 0 <= self.warmup_steps <= self.total_steps - self.frozen_steps:
            raise UserError(
                f"OptimizerConfig.warmup_steps = {self.warmup_steps} must lie between 0 and "
                f"OptimizerConfig.total_steps - frozen_steps = "
                f"{self.total_steps} - {self.frozen_steps}"
            )


@dataclass(frozen=True)
class ProfileConfig:
    """What is measured in a training run.

    Attributes:
      steps: first and last step that are traced, for TensorBoard and XProf. The trace is written
        to model_dir/profile. () = none. Step 1 compiles, so begin later.
      peak_flops: FLOP/s of one device, for the model FLOPs utilisation. 0 = the known value for
        this kind of device; if it is unknown, the metrics have no utilisation.
    """

    steps: tuple[bounds.AtLeast1, ...] = ()
    peak_flops: bounds.NotNegative = 0.0

    def __post_init__(self) -> None:
        """Refuse values that are not a range of steps.

        Raises:
          UserError: names the binding.
        """
        bounds.check(self)
        if self.steps and not (len(self.steps) == 2 and self.steps[0] <= self.steps[1]):
            raise UserError(
                f"ProfileConfig.steps = {self.steps!r}: expected () or (first, last), 1 or more"
            )
