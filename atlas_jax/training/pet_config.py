"""The settings of `pet`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from atlas_jax.core import bounds
from atlas_jax.core.errors import require
from atlas_jax.training.classifier_config import EncoderRun, check_fields
from atlas_jax.training.config import OptimizerConfig


@dataclass(frozen=True)
class PetConfig:
    """One run of `pet`; the defaults are those of the released code for SuperGLUE.

    model_dir: `members/` holds a run for each pattern and seed, `final/` the distilled classifier.
    encoder, encoder_base, task, file, eval_file: as in ClassifierTrainConfig; `file` has the
        labelled lines.
    unlabelled_file: lines of the same task, whose labels, if they have any, are not read.
    leave_out_known: as in SelfTrainConfig.
    unlabelled_rows: of them at most, drawn by the seed; 0 = all.
    patterns: templates in place of the task's one; () = that one.
    seeds: members of each pattern.
    steps, batch_size: of a member. The original's batch is 4 lines, four times before an update.
    learning_rate: peak rate of members and classifier.
    weighted: members count by their pattern's accuracy on the labelled lines before training;
        False = all alike.
    temperature: of the distillation.
    generations: 1 = PET; more = iPET, whose members learn anew, from more lines each time, which
        some of the other members have labelled.
    generation_factor: how many times more lines each generation has.
    generation_share: share of the other members, drawn for each, that label its lines; at least
        one does.
    distil_steps, distil_batch_size: of the classifier, on unlabelled lines.
    length, train, seed, log_every, eval_batch_size: as in ClassifierTrainConfig; `train` is of the
        members. Member j of a pattern has the seed `seed + j`.

    The original can add an MLM loss on unlabelled text to a member's; there is none here.
    """

    model_dir: str
    encoder: str
    file: str
    unlabelled_file: str
    task: str = "sst2"
    encoder_base: str = ""
    eval_file: str = ""
    leave_out_known: bool = True
    unlabelled_rows: bounds.AtLeast0 = 10_000
    patterns: Sequence[str] = ()
    seeds: bounds.AtLeast1 = 3
    steps: bounds.AtLeast1 = 250
    batch_size: bounds.BatchSize = 16
    learning_rate: bounds.NotNegative = 1e-5
    weighted: bool = True
    temperature: bounds.Positive = 2.0
    generations: bounds.AtLeast1 = 1
    generation_factor: bounds.Positive = 5.0
    generation_share: bounds.Share = 0.25
    distil_steps: bounds.AtLeast1 = 5000
    distil_batch_size: bounds.BatchSize = 16
    length: bounds.Length = 256
    train: Sequence[str] = ()
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 50
    eval_batch_size: bounds.BatchSize = 64

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        name = "PetConfig"
        check_fields(self, "model_dir", "encoder", "file", "unlabelled_file")
        one = isinstance(self.patterns, str)  # a single template would be taken for its letters
        require(not one, f"{name}.patterns", self.patterns, "a list of templates")
        object.__setattr__(self, "patterns", tuple(self.patterns))
        twice = len(set(self.patterns)) < len(self.patterns)
        require(not twice, f"{name}.patterns", self.patterns, "each template once")
        members = max(len(self.patterns), 1) * self.seeds
        require(self.generations == 1 or members > 1, f"{name}.generations", self.generations,
                "1 where there is one member, which has no others to learn from")  # fmt: skip
        require(self.generation_factor > 1, f"{name}.generation_factor", self.generation_factor,
                "more than 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PetRun(EncoderRun):
    """The settings of `pet`.

    Attributes:
      delta: adapters or LoRA of the members and of the classifier; PET has none.
      optimizer: of members and classifier; its rate and lengths are those of `train`.
    """

    DECIDED: ClassVar[Mapping[str, str]] = {
        "learning_rate": "learning_rate",
        "total_steps": "steps",
    }

    train: PetConfig
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.01)
