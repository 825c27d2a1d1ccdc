"""The settings of `self_train`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from atlas_jax.core import bounds
from atlas_jax.core.errors import require
from atlas_jax.training.classifier_config import EncoderRun, check_fields
from atlas_jax.training.config import OptimizerConfig


@dataclass(frozen=True)
class SelfTrainConfig:
    """One run of `self_train`; the defaults are LiST's (run.sh), for 30 labelled lines.

    model_dir, encoder, encoder_base, task, file, eval_file: as in ClassifierTrainConfig; `file` has
        the labelled lines. The encoder is asked by the task's prompt.
    unlabelled_file: lines of the same task, whose labels, if they have any, are not read.
    leave_out_known: leave out unlabelled lines whose text is that of a labelled line or of a line
        of eval_file, but for case and blanks.
    teacher_steps: steps of the first teacher, on labelled lines.
    rounds: rounds of a teacher and a student.
    kd_steps, meta_steps, tune_steps: of each round: distillation, distillation with weights,
        labelled lines.
    weighted: False = the meta steps have no weights: self-training without them.
    batch_size, unlabelled_batch_size, meta_batch_size: lines of a step; the last are the labelled
        lines that the weights are of.
    teacher_learning_rate, student_learning_rate: peak rates; each falls to 0, the student's in
        every round.
    meta_learning_rate: eta of the weights' imagined step.
    length, train, seed, log_every, eval_every, eval_batch_size: as in ClassifierTrainConfig.
    """

    model_dir: str
    encoder: str
    file: str
    unlabelled_file: str
    task: str = "sst2"
    encoder_base: str = ""
    eval_file: str = ""
    leave_out_known: bool = True
    teacher_steps: bounds.AtLeast1 = 400
    rounds: bounds.AtLeast1 = 6
    kd_steps: bounds.AtLeast0 = 600
    meta_steps: bounds.AtLeast0 = 400
    tune_steps: bounds.AtLeast0 = 400
    weighted: bool = True
    batch_size: bounds.BatchSize = 4
    unlabelled_batch_size: bounds.BatchSize = 16
    meta_batch_size: bounds.BatchSize = 4
    teacher_learning_rate: bounds.NotNegative = 5e-6
    student_learning_rate: bounds.NotNegative = 1e-4
    meta_learning_rate: bounds.Positive = 5e-6
    length: bounds.Length = 128
    train: Sequence[str] = ()
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 50
    eval_every: bounds.Every = 0
    eval_batch_size: bounds.BatchSize = 64

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        name = "SelfTrainConfig"
        check_fields(self, "model_dir", "encoder", "file", "unlabelled_file")
        require(
            self.kd_steps + self.meta_steps + self.tune_steps > 0,
            f"{name}.kd_steps", self.kd_steps, "a round of one step or more",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SelfTrainingRun(EncoderRun):
    """The settings of `self_train`.

    Attributes:
      optimizer: of teacher and student; its rate and length are those of `train`.
    """

    DECIDED: ClassVar[Mapping[str, str]] = {
        "learning_rate": "student_learning_rate", "total_steps": "kd_steps",
    }  # fmt: skip

    train: SelfTrainConfig
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
