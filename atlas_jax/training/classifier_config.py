"""The settings of `train_classifier`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from atlas_jax.core import bounds
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices
from atlas_jax.core.errors import UserError, one_of, require
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.tasks.classification import ClassificationTask
from atlas_jax.training.config import CheckpointConfig, OptimizerConfig, ProfileConfig

METHODS = ("prompt", "head", "probe", "majority")
DEMONSTRATIONS = ("none", "random", "similar")


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """One run of `train_classifier`: an encoder, a classification task, and how it is asked.

    model_dir: as in TrainConfig; `final/` holds the trained encoder.
    encoder: model folder with an encoder (or a retriever of one tower).
    encoder_base: where the base of a partial encoder lies now.
    task, file: the task's name and its labelled lines.
    eval_file: lines that are classified and scored; '' = none.
    method: 'prompt' (the task's template and words, the MLM head), 'head' (a classifier on the
        pooled first token), 'probe' (logistic regression on the frozen mean states) or 'majority'
        (the commonest label, whatever the text).
    total_steps: training ends after this step; 0 = the encoder is scored as it is. A probe and the
        majority have no steps.
    batch_size: texts of a step.
    length: of a text in tokens, special ones and template included.
    train: patterns of the paths that train (`encoder/*`, `mlm/*`, `*layer_norm*`); () = adapters or
        LoRA where there are some (encoder/DeltaConfig), else the encoder, and the head in use.
    probe_decay: the probe's weight of half the squared length of its kernel, against the summed
        loss.
    seed: decides a new head, adapters, order and dropout.
    log_every: steps between two lines of metrics.
    eval_every: steps between evaluations; there is one at the end in any case.
    eval_batch_size: texts that are classified at once.
    """

    model_dir: str
    encoder: str
    file: str
    task: str = "sst2"
    encoder_base: str = ""
    eval_file: str = ""
    method: Literal["prompt", "head", "probe", "majority"] = "prompt"
    total_steps: bounds.AtLeast0 = 1000
    batch_size: bounds.BatchSize = 8
    length: bounds.Length = 128
    train: Sequence[str] = ()
    probe_decay: bounds.Positive = 1.0
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 50
    eval_every: bounds.Every = 0
    eval_batch_size: bounds.BatchSize = 64

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        name = "ClassifierTrainConfig"
        check_fields(self, "model_dir", "encoder", "file")
        require(self.method in METHODS, f"{name}.method", self.method, one_of(METHODS))
        require(
            bool(self.eval_file) or self.steps > 0,
            f"{name}.eval_file", self.eval_file, "a file to score, where nothing is trained",
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """The steps that the method takes."""
        return self.total_steps if self.method in ("prompt", "head") else 0


@dataclass(frozen=True)
class DemonstrationConfig:
    """Labelled examples behind each prompt of `train_classifier`.

    kind: 'none', 'random', or 'similar' (drawn from the more similar examples alone).
    draws: over which the logits of an evaluation are averaged.
    share: of the examples of a class that 'similar' draws from.
    length: tokens of one example, its end token included; 0 = text and examples share
        ClassifierTrainConfig.length evenly. The fields of longer examples are cut at their ends.
    """

    kind: Literal["none", "random", "similar"] = "none"
    draws: bounds.AtLeast1 = 16
    share: bounds.Share = 0.5
    length: bounds.LengthOrModels = 0

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        bounds.check(self)
        require(
            self.kind in DEMONSTRATIONS,
            "DemonstrationConfig.kind",
            self.kind,
            one_of(DEMONSTRATIONS),
        )

    def lengths(self, whole: int, classes: int) -> tuple[int, int]:
        """Tokens of the text, special ones included, and of one example with its end token.

        Args:
          whole: of a row.
          classes: the number of examples.

        Raises:
          UserError: no room for the text.
        """
        own = self.length or (whole - 1) // (classes + 1)
        text = whole - classes * own
        if text < own:
            raise UserError(
                f"ClassifierTrainConfig.length = {whole} has no room for a text beside {classes} "
                f"examples of {own} tokens (DemonstrationConfig.length): allow longer rows, or "
                "shorter examples"
            )
        return text, own


def check_fields(config: Any, *paths: str) -> None:
    """Check bounds and the paths that must be given; make the patterns of `train` a tuple.

    Raises:
      UserError: names the binding.
    """
    bounds.check(config)
    for own in paths:
        require(bool(getattr(config, own)), f"{type(config).__name__}.{own}", "", "a path")
    object.__setattr__(config, "train", tuple(config.train))


@dataclass(frozen=True, kw_only=True)
class EncoderRun:
    """The settings that every run of an encoder on a task has.

    Attributes:
      task: reads the lines of the files.
      encoder: fields of `EncoderModelConfig` in place of the folder's: dropout_rate, dtype...
      delta: adapters or LoRA beside the encoder's parameters.
      rows: what happens to a broken line of the files.
      text: all settings as a gin file, which is kept with the run.
    """

    SCOPE: ClassVar[str] = "encoder"
    # Fields of the optimiser that `train` decides, by the field that does; gin may not bind them.
    DECIDED: ClassVar[Mapping[str, str]] = {}

    task: ClassificationTask
    encoder: Mapping[str, Any] = field(default_factory=dict)
    delta: DeltaConfig = DeltaConfig()
    devices: Devices = Devices()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    rows: RowsConfig = RowsConfig()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(EncoderRun):
    """The settings of `train_classifier`."""

    train: ClassifierTrainConfig
    demonstrations: DemonstrationConfig = DemonstrationConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, weight_decay=0.0)
