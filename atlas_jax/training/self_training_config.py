"""The settings of `self_train`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.answering.defaults import Fields, defaults_of, fields_of
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core import bounds
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError, one_of, require
from atlas_jax.corpus.config import PASSAGE_SOURCES, CorpusConfig, CorpusSpec
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import ModelSpec
from atlas_jax.models.expects import Expects
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.base import Task
from atlas_jax.tasks.labelled import LabelledTask
from atlas_jax.training.classifier_config import EncoderRun, check_fields
from atlas_jax.training.config import OptimizerConfig, StepConfig
from atlas_jax.training.run import TrainingRun, asking_of


@dataclass(frozen=True)
class SelfTrainConfig:
    """One run of `self_train`; the defaults are LiST's (run.sh), for 30 labelled lines.

    model_dir, task, file, eval_file: as in ClassifierTrainConfig; `file` has the labelled lines.
    encoder, encoder_base: as in ClassifierTrainConfig. The encoder is asked by the task's prompt.
        Without one the reader of ModelConfig learns, over the passages that are found for a line.
    unlabelled_file: lines of the same task, whose labels, if they have any, are not read.
    leave_out_known: leave out unlabelled lines whose text is that of a labelled line or of a line
        of eval_file, but for case and blanks.
    teacher_steps: steps of the first teacher, on labelled lines.
    rounds: rounds of a teacher and a student.
    kd_steps, meta_steps, tune_steps: of each round: distillation, distillation with weights,
        labelled lines.
    pseudo_labels: 'soft' (the teacher's probabilities) or 'hard' (its likeliest class).
    weighted: False = the meta steps have no weights: self-training without them.
    batch_size, unlabelled_batch_size, meta_batch_size: lines of a step; the last are the labelled
        lines that the weights are of.
    teacher_learning_rate, student_learning_rate: peak rates; each falls to 0, the student's in
        every round.
    meta_learning_rate: eta of the weights' imagined step.
    passages: where a reader's passages come from: 'index', 'file' or 'none' (closed book).
    length: tokens of an encoder's text; those of a reader are DataConfig's and StepConfig's.
    train, seed, log_every, eval_every, eval_batch_size: as in ClassifierTrainConfig.
    """

    model_dir: str
    file: str
    unlabelled_file: str
    encoder: str = ""
    task: str = "sst2"
    encoder_base: str = ""
    eval_file: str = ""
    leave_out_known: bool = True
    teacher_steps: bounds.AtLeast1 = 400
    rounds: bounds.AtLeast1 = 6
    kd_steps: bounds.AtLeast0 = 600
    meta_steps: bounds.AtLeast0 = 400
    tune_steps: bounds.AtLeast0 = 400
    pseudo_labels: Literal["soft", "hard"] = "soft"
    weighted: bool = True
    batch_size: bounds.BatchSize = 4
    unlabelled_batch_size: bounds.BatchSize = 16
    meta_batch_size: bounds.BatchSize = 4
    teacher_learning_rate: bounds.NotNegative = 5e-6
    student_learning_rate: bounds.NotNegative = 1e-4
    meta_learning_rate: bounds.Positive = 5e-6
    passages: str = "index"
    length: bounds.Length = 128
    train: Sequence[str] = ()
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 50
    eval_every: bounds.Every = 0
    eval_batch_size: bounds.BatchSize = 64

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        name = "SelfTrainConfig"
        check_fields(self, "model_dir", "file", "unlabelled_file")
        for field, allowed in (("passages", PASSAGE_SOURCES), ("pseudo_labels", ("soft", "hard"))):
            value = getattr(self, field)
            require(value in allowed, f"{name}.{field}", value, one_of(allowed))
        require(
            self.kd_steps + self.meta_steps + self.tune_steps > 0,
            f"{name}.kd_steps", self.kd_steps, "a round of one step or more",
        )  # fmt: skip


# Fields of the optimiser that `SelfTrainConfig` decides, by the field that does.
_DECIDED = {"learning_rate": "student_learning_rate", "total_steps": "kd_steps"}
_OPTIMIZER = OptimizerConfig(weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class SelfTrainingRun(EncoderRun):
    """The settings of `self_train` for an encoder.

    Attributes:
      optimizer: of teacher and student; its rate and length are those of `train`.
    """

    DECIDED: ClassVar[Mapping[str, str]] = _DECIDED

    train: SelfTrainConfig
    optimizer: OptimizerConfig = _OPTIMIZER

    def __post_init__(self) -> None:
        """Refuse a run without an encoder; the error names the binding."""
        require(
            bool(self.train.encoder),
            "SelfTrainConfig.encoder",
            "",
            "a model folder with an encoder; a reader is taught by a ReaderSelfTrainingRun",
        )


@dataclass(frozen=True, kw_only=True)
class ReaderSelfTrainingRun(TrainingRun):
    """The settings of `self_train` for the reader; the retriever finds its passages and stays.

    Attributes:
      task: reads the lines of the files; a label is scored by the likelihood of its word.
      step: how passages are read.
      generation: its length penalty decides how words of several tokens compare.
      optimizer: of teacher and student; its rate and length are those of `train`.
    """

    SCOPE: ClassVar[str] = "reader"
    DECIDED: ClassVar[Mapping[str, str]] = _DECIDED
    # Fields of `step` that self-training has no use for.
    UNUSED: ClassVar[tuple[str, ...]] = (
        "train", "accumulate", "reads", "packed_rows", "packed_passages", "clip",
    )  # fmt: skip

    train: SelfTrainConfig
    task: LabelledTask
    step: StepConfig = StepConfig(retriever_training="fixed")
    generation: GenerationConfig = GenerationConfig()
    optimizer: OptimizerConfig = _OPTIMIZER

    @classmethod
    def from_folder(
        cls,
        model: str | os.PathLike[str],
        train: SelfTrainConfig,
        corpus: CorpusConfig = CorpusConfig(),
        *,
        delta: DeltaConfig = DeltaConfig(),
        task: LabelledTask | None = None,
        formats: StoreConfig | Fields | None = None,
        step: StepConfig | Fields | None = None,
        data: DataConfig | Fields | None = None,
        **others: Any,
    ) -> "ReaderSelfTrainingRun":
        """A run that teaches the reader of a folder, which reads as the folder says.

        What ``formats``, ``step`` and ``data`` tell otherwise counts instead: a dict of some
        fields, or a whole config.

        Args:
          model: the folder, of reader and retriever.
          train: what is learnt from, how long, and where it is written.
          corpus: which passages are searched.
          delta: adapters or LoRA that the reader gets.
          task: None = that of ``train.task``, in the wording of the folder.
          others: further fields of `ReaderSelfTrainingRun`.

        Raises:
          UserError: the folder is none, or a length that the retriever cannot read.
        """
        spec = replace(ModelSpec.of_folder(model), deltas={"reader": delta})
        defaults = defaults_of(spec, train.task, train.passages != "none")
        reading = {**fields_of(step, StepConfig, "step"), "retriever_training": "fixed"}
        if task is None:
            found = labelled(defaults.task(train.task, {}))
            task = replace(found, answer_by="likelihood")
        return cls(
            **{"generation": defaults.generation({}), **others},
            train=train,
            task=task,
            models=spec,
            corpus=CorpusSpec(corpus, defaults.store(fields_of(formats, StoreConfig, "formats"))),
            step=defaults.read(StepConfig, reading),
            data=defaults.data(fields_of(data, DataConfig, "data")),
        )

    def __post_init__(self) -> None:
        """Refuse what does not fit a reader's self-training; the error names the binding."""
        task = type(self.task).__name__
        require(
            not self.train.encoder,
            "SelfTrainConfig.encoder", self.train.encoder, "'', where a reader is taught",
        )  # fmt: skip
        require(
            self.task.answer_by == "likelihood",
            f"{task}.answer_by", self.task.answer_by,
            "'likelihood': the classes are compared by their words",
        )  # fmt: skip
        require(
            self.step.retriever_training == "fixed",
            "StepConfig.retriever_training", self.step.retriever_training,
            "'fixed': self-training teaches the reader alone",
        )  # fmt: skip
        for name in self.UNUSED:
            value = getattr(self.step, name)
            require(
                value == getattr(StepConfig, name),
                f"StepConfig.{name}", value, "no value in a run of self_train",
            )  # fmt: skip

    @property
    def searches(self) -> bool:
        """Whether passages are searched in an index."""
        return self.train.passages == "index"

    @property
    def answers(self) -> AnswerRun:
        """The settings of its evaluations."""
        train = self.train
        return AnswerRun(
            models=self.models,
            corpus=self.corpus,
            evaluation=EvalConfig(
                file=train.eval_file,
                task=self.task.name,
                passages=train.passages,
                batch_size=train.eval_batch_size,
            ),
            task=self.task,
            read=self.step,
            data=self.data,
            generation=self.generation,
            rows=self.rows,
            devices=self.devices,
        )

    def taught(self, before: Expects, store: StoreConfig | None) -> Expects:
        """What the trained models expect; see `TrainRun.taught`."""
        if self.train.passages == "file":
            store = self.corpus.formats
        asked = {self.task.name: asking_of(self.task, self.data)}
        return before.taught(store, self.step.reader_length, asked)


def labelled(task: Task) -> LabelledTask:
    """The task of a run that teaches a reader classes.

    Raises:
      UserError: its answer is none of a few labels.
    """
    if not isinstance(task, LabelledTask):
        raise UserError(
            f"SelfTrainConfig.task = {task.name!r}: a reader is taught a task of labels, such as "
            "'fever' or 'boolq', or a classification task"
        )
    return task
