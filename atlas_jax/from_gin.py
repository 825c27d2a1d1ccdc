"""The only place where gin bindings become config objects.

Importing this module registers every configurable. `load_gin` then reads files and flags. The
functions here turn the bindings into one value for a command; code below never asks gin.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import gin

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig, RetrieveConfig
from atlas_jax.answering.defaults import Defaults, defaults_of
from atlas_jax.answering.leaks import LeakConfig
from atlas_jax.answering.run import AnswerRun, IndexRun, RetrieveRun
from atlas_jax.core import bounds
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.config import config_text
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices
from atlas_jax.core.errors import UserError, no_value_for, require
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.partitioning import MeshConfig, PartitionRules
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec, RecallConfig
from atlas_jax.corpus.rounding import new_dtype, settled_rerank
from atlas_jax.datasets.passage_rules import PassagesConfig
from atlas_jax.datasets.tokenizer_training import train_tokenizers
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.encoders.masking import MaskingConfig
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.encoders.objectives import with_objectives
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.staleness import StalenessConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.models.expects import NOTHING
from atlas_jax.models.new_deltas import check_soft, where_deltas_stand
from atlas_jax.models.parameters import Models
from atlas_jax.planning.run import AnyRun, Entry, Pretraining, Run
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.contrastive import ContrastiveConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.serving.config import ServeConfig
from atlas_jax.tasks.base import Task
from atlas_jax.tasks.classification import CLASSIFICATION, ClassificationTask
from atlas_jax.tasks.registry import TASKS, task_class
from atlas_jax.training.classifier_config import (
    ClassifierRun,
    ClassifierTrainConfig,
    DemonstrationConfig,
    EncoderRun,
)
from atlas_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    ProfileConfig,
    RetrieverTrainConfig,
    StepConfig,
    TrainConfig,
)
from atlas_jax.training.pet_config import PetConfig, PetRun
from atlas_jax.training.pretrain_config import EncoderTrainConfig, PretrainRun
from atlas_jax.training.run import RetrieverRun, TrainRun, retrieves
from atlas_jax.training.self_training_config import (
    ReaderSelfTrainingRun,
    SelfTrainConfig,
    SelfTrainingRun,
    labelled,
)

Config = TypeVar("Config")
Result = TypeVar("Result")
OnTask = TypeVar("OnTask", ClassifierRun, SelfTrainingRun, PetRun)

# Functions and classes that gin files bind by name. They are not changed: only `told` and `called`
# take their arguments from gin.
CONFIGURABLES = (
    CheckpointConfig, ClassifierTrainConfig, CompilerConfig, ContrastiveConfig, CorpusConfig,
    DataConfig, DeltaConfig, DemonstrationConfig, DistillationConfig, EncoderModelConfig,
    EncoderTrainConfig, EvalConfig, GenerationConfig, LeakConfig, MaskingConfig, MeshConfig,
    ModelConfig, OptimizerConfig, PartitionRules, PassagesConfig, PetConfig, ProfileConfig,
    ReaderConfig, RecallConfig, RefreshPolicy, RetrieveConfig, RetrieverConfig,
    RetrieverTrainConfig, RowsConfig, ScannConfig, SelfTrainConfig, ServeConfig, StalenessConfig,
    StepConfig, StoreConfig, TrainConfig, train_tokenizers, *TASKS.values(),
)  # fmt: skip
for _one in CONFIGURABLES:
    gin.external_configurable(_one)


def told(config: type[Config], scope: str = "") -> Config:
    """Make a config from gin's bindings, with defaults for its other fields.

    Args:
      config: one of `CONFIGURABLES`, or a user's own class that gin knows.
      scope: 'reader' or 'retriever', if each of them has such a config.

    Raises:
      UserError: a value that the config refuses.
      TypeError: a field without a value; `launch` words it.
    """
    with gin.config_scope(scope or None):
        return gin.get_configurable(config)(**_left_open(config))


def called(function: Callable[..., Result], **given: Any) -> Result:
    """Call a function with the arguments bound in gin and those given here."""
    configured: Callable[..., Result] = gin.get_configurable(function)
    return configured(**given)


def fields_told(config: type[Any]) -> dict[str, Any]:
    """Only the fields of a config that are bound in gin, but for those left open by None."""
    left_open = _left_open(config)
    return {name: v for name, v in gin.get_bindings(config).items() if name not in left_open}


def _left_open(config: type[Any]) -> dict[str, Any]:
    """Fields that are bound to None, which they do not accept as a value, with their defaults.

    A gin file binds a macro to None to leave it to the model folder.
    """
    if not dataclasses.is_dataclass(config):
        return {}
    bound = gin.get_bindings(config)
    defaults = {}
    for field in dataclasses.fields(config):
        if field.name in bound and bound[field.name] is None:
            if not bounds.expected(bounds.annotations(config)[field.name], None):
                continue
            if field.default is dataclasses.MISSING:
                raise UserError(no_value_for([f"{config.__name__}.{field.name}"]))
            defaults[field.name] = field.default
    return defaults


_NOTHING_EXPECTED = Defaults(NOTHING, None)


def task(name: str, defaults: Defaults = _NOTHING_EXPECTED) -> Task:
    """The task of this name: fields bound in gin, else as the models expect, else its defaults.

    Raises:
      UserError: there is no such task, or a field is at fault.
    """
    found: Any = task_class(name)
    try:
        known = gin.get_configurable(found)
    except ValueError:  # of somebody's own, and not for gin
        return defaults.task(name, {})
    has_fields = dataclasses.is_dataclass(found)
    made: Task = defaults.task(name, fields_told(found)) if has_fields else known()
    return made


def devices() -> Devices:
    """Mesh, rules and compiler."""
    return Devices(told(MeshConfig), told(PartitionRules), told(CompilerConfig))


def models() -> ModelSpec:
    """Where the two models come from."""
    return ModelSpec(
        told(ModelConfig),
        fields_told(ReaderConfig),
        fields_told(RetrieverConfig),
        {part: told(DeltaConfig, part) for part in PARTS},
    )


def corpus(defaults: Defaults | None = None) -> CorpusSpec:
    """Which passages are searched, and how; without `defaults`, for models of any kind."""
    formats = defaults.store(fields_told(StoreConfig)) if defaults else told(StoreConfig)
    return CorpusSpec(
        told(CorpusConfig), formats, told(ScannConfig), told(RowsConfig), told(RecallConfig)
    )


def index_run() -> IndexRun:
    """The settings of `build_index`, and of the import of an index."""
    spec = models()
    defaults = defaults_of(spec)
    defaults.data(fields_told(DataConfig))  # queries too long for the retriever are refused now
    return IndexRun(**_base(spec, defaults))


def retrieve_run() -> RetrieveRun:
    """The settings of `retrieve`."""
    config, spec = told(RetrieveConfig), models()
    return RetrieveRun(
        **_questions(config.task, spec, defaults_of(spec, config.task)),
        retrieve=config,
        recall_at=told(EvalConfig).recall_at,
    )


def answer_run() -> AnswerRun:
    """The settings of `evaluate`, `ask` and `serve`."""
    config, spec = told(EvalConfig), models()
    defaults = defaults_of(spec, config.task, config.passages != "none")
    return AnswerRun(
        **_questions(config.task, spec, defaults),
        evaluation=config,
        read=defaults.read(StepConfig, fields_told(StepConfig)),
        generation=defaults.generation(fields_told(GenerationConfig)),
    )


def serve_config() -> ServeConfig:
    """The settings of the server of `serve`; what it answers with is an `answer_run`."""
    return told(ServeConfig)


def train_run() -> TrainRun:
    """The settings of `train` and `doctor`."""
    config, evaluation, spec = told(TrainConfig), told(EvalConfig), models()
    defaults = defaults_of(spec, config.task, retrieves(config, evaluation))
    return TrainRun(
        **_training(spec, defaults),
        train=config,
        task=task(config.task, defaults),
        eval_task=task(evaluation.task, defaults),
        step=defaults.read(StepConfig, fields_told(StepConfig)),
        distillation=told(DistillationConfig),
        optimizers={part: told(OptimizerConfig, part) for part in PARTS},
        refresh=told(RefreshPolicy),
        staleness=told(StalenessConfig),
        evaluation=evaluation,
        generation=defaults.generation(fields_told(GenerationConfig)),
    )


def retriever_run() -> RetrieverRun:
    """The settings of `train_retriever`."""
    config, spec = told(RetrieverTrainConfig), models()
    defaults = defaults_of(spec, config.task)
    return RetrieverRun(
        **_training(spec, defaults),
        train=config,
        task=task(config.task, defaults) if config.task else None,
        contrastive=told(ContrastiveConfig),
        optimizer=told(OptimizerConfig, "retriever"),
    )


def pretrain_run() -> PretrainRun:
    """The settings of `pretrain_encoder`."""
    return PretrainRun(
        **_of_encoder(),
        train=told(EncoderTrainConfig),
        delta=told(DeltaConfig, PretrainRun.SCOPE),
        masking=told(MaskingConfig),
        optimizer=_optimizer(PretrainRun.optimizer),
    )


def classifier_run() -> ClassifierRun:
    """The settings of `train_classifier`."""
    run = _on_task(ClassifierRun, ClassifierTrainConfig)
    return dataclasses.replace(run, demonstrations=told(DemonstrationConfig))


def self_training_run() -> SelfTrainingRun | ReaderSelfTrainingRun:
    """The settings of `self_train`, for an encoder or else for the reader of ModelConfig.

    Raises:
      UserError: a rate or a length is bound that the run has of its own, or a setting is at fault.
    """
    config = told(SelfTrainConfig)
    if config.encoder:
        return _on_task(SelfTrainingRun, SelfTrainConfig)
    run, spec = ReaderSelfTrainingRun, models()
    _refuse_decided(run.DECIDED, SelfTrainConfig.__name__, run.SCOPE)
    defaults = defaults_of(spec, config.task, config.passages != "none")
    return run(
        **_training(spec, defaults),
        train=config,
        task=labelled(task(config.task, defaults)),
        step=defaults.read(StepConfig, {"retriever_training": "fixed", **fields_told(StepConfig)}),
        generation=defaults.generation(fields_told(GenerationConfig)),
        optimizer=_optimizer(run.optimizer, run.SCOPE),
    )


def pet_run() -> PetRun:
    """The settings of `pet`.

    Raises:
      UserError: a rate or a length is bound that the run has of its own.
    """
    return _on_task(PetRun, PetConfig)


def _on_task(run: type[OnTask], train: type[Any]) -> OnTask:
    """The settings of a run of an encoder on a task.

    Args:
      run: what to make.
      train: class of its config, which names the task.
    """
    config, name = told(train), train.__name__
    _refuse_decided(run.DECIDED, name, run.SCOPE)
    return run(**_encoder_run(config.task, name), train=config, optimizer=_optimizer(run.optimizer))


def _refuse_decided(decided: Mapping[str, str], config: str, scope: str) -> None:
    """Refuse bindings of the optimiser that a run decides itself."""
    with gin.config_scope(scope):
        bound = fields_told(OptimizerConfig)
    for name, instead in decided.items():
        require(name not in bound, f"{scope}/OptimizerConfig.{name}", bound.get(name),
                f"no value; bind {config}.{instead} and the like")  # fmt: skip


def _encoder_run(name: str, config: str) -> dict[str, Any]:
    """Fields of an `EncoderRun`, of a task.

    Raises:
      UserError: the task has no template.
    """
    known = [made.name for made in CLASSIFICATION]
    found = task(name)
    require(isinstance(found, ClassificationTask), f"{config}.task", name,
            f"a classification task: {', '.join(known)}")  # fmt: skip
    return {
        **_of_encoder(),
        "task": found,
        "delta": told(DeltaConfig, EncoderRun.SCOPE),
    }


def _of_encoder() -> dict[str, Any]:
    """Fields of every run that trains an encoder."""
    return {
        "encoder": fields_told(EncoderModelConfig),
        "devices": devices(),
        "checkpoints": told(CheckpointConfig),
        "profile": told(ProfileConfig),
        "rows": told(RowsConfig),
        "text": config_text(),
    }


def _optimizer(default: OptimizerConfig, scope: str = EncoderRun.SCOPE) -> OptimizerConfig:
    """The optimiser of a scope; what is not bound is as in `default`."""
    with gin.config_scope(scope):
        return dataclasses.replace(default, **fields_told(OptimizerConfig))


def _base(spec: ModelSpec, defaults: Defaults) -> dict[str, Any]:
    """Fields of every run."""
    return {"models": spec, "corpus": corpus(defaults), "devices": devices()}


def _questions(name: str, spec: ModelSpec, defaults: Defaults) -> dict[str, Any]:
    """Fields of a `QuestionRun`, of a task."""
    return {
        **_base(spec, defaults),
        "task": task(name, defaults),
        "data": defaults.data(fields_told(DataConfig)),
        "rows": told(RowsConfig),
    }


def _training(spec: ModelSpec, defaults: Defaults) -> dict[str, Any]:
    """Fields of a `TrainingRun`."""
    return {
        **_base(spec, defaults),
        "data": defaults.data(fields_told(DataConfig)),
        "checkpoints": told(CheckpointConfig),
        "profile": told(ProfileConfig),
        "rows": told(RowsConfig),
        "text": config_text(),
    }


def plan_run(passages: int | None) -> AnyRun:
    """The settings of a plan; no file is read.

    Args:
      passages: how many passages will be searched; None for a run of `pretrain_encoder`.

    Raises:
      UserError: the sizes of the models are not bound, passages that nothing searches or that are
        missing, or the run is of a command that has no plan.
    """
    if fields_told(EncoderTrainConfig):
        require(passages is None, "--passages", passages, "nothing: pretrain_encoder has no index")
        return _pretraining_plan()
    require(passages is not None, "--passages", passages, "the number of the index's rows")
    assert passages is not None
    if "vocab_size" not in fields_told(ReaderConfig):
        raise UserError("plan reads no checkpoint: give the sizes with --gin_file=models/NAME.gin")
    step, retriever, evaluation = told(StepConfig), told(RetrieverConfig), told(EvalConfig)
    entry, source, refreshes = _entry(), evaluation.passages, False
    if entry == "train":
        source = fields_told(TrainConfig).get("passages", "index")
        refreshes = told(RefreshPolicy).refreshes or told(StalenessConfig).refresh_below > 0
    else:
        step = dataclasses.replace(step, retriever_training="fixed")
    if step.retriever_training == "query_side" and retriever.tied:
        retriever = dataclasses.replace(retriever, tied=False)  # as assembly.assemble does
    answer_k = evaluation.k or step.k
    answer_depth = max(*evaluation.recall_at, answer_k) if evaluation.recall_at else answer_k
    corpus = told(CorpusConfig)
    dtype = new_dtype(corpus, passages, retriever.embedding_dim)
    wanted = step.k if entry == "train" else answer_depth
    searched = dtype if source == "index" else ""
    rerank = settled_rerank(step.rerank, wanted, corpus, searched)
    step = dataclasses.replace(step, rerank=rerank)
    training = step.retriever_training if entry == "train" else "joint"
    deltas = where_deltas_stand({p: told(DeltaConfig, p) for p in PARTS}, training)
    check_soft(deltas, told(ReaderConfig))
    return Run(
        entry=entry,
        refreshes=refreshes,
        models=Models(T5(told(ReaderConfig)), DualEncoder(retriever), tuple(deltas.items())),
        step=step,
        distillation=told(DistillationConfig),
        optimizers={part: told(OptimizerConfig, part) for part in PARTS},
        data=told(DataConfig),
        store=told(StoreConfig).fitted(retriever.max_length),
        corpus=dataclasses.replace(corpus, dtype=dtype),
        generation=told(GenerationConfig),
        answer_batch=evaluation.batch_size,
        answer_k=answer_k,
        answer_depth=answer_depth,
        passage_source=source,
        passages=passages,
        rules=tuple(told(PartitionRules).rules),
    )


def _pretraining_plan() -> Pretraining:
    """The settings of a plan of `pretrain_encoder`."""
    run = pretrain_run()
    if "vocab_size" not in run.encoder:
        raise UserError(
            "plan reads no checkpoint: bind the sizes of EncoderModelConfig, as "
            "--gin_file=runs/albert_released.gin does"
        )
    made = EncoderModelConfig(**run.encoder)
    return Pretraining(
        run, with_objectives(made, run.train.objectives), tuple(told(PartitionRules).rules)
    )


# Their step or batch is none of the programs that are planned.
_UNPLANNED = {
    RetrieverTrainConfig: "train_retriever",
    ClassifierTrainConfig: "train_classifier",
    SelfTrainConfig: "self_train",
    PetConfig: "pet",
    RetrieveConfig: "retrieve",
}


def _entry() -> Entry:
    """The entry point that the bindings are for."""
    for config, command in _UNPLANNED.items():
        if fields_told(config):
            raise UserError(
                f"{config.__name__} is bound, so this is a run of `{command}`, which has no plan; "
                "those of `train`, `evaluate`, `build_index` and `pretrain_encoder` have"
            )
    if fields_told(TrainConfig):
        return "train"
    return "evaluate" if fields_told(EvalConfig) else "build_index"
