"""The only place where gin bindings become config objects.

Importing this module registers every configurable. `load_gin` then reads files and flags. The
functions here turn the bindings into one value for a command; code below never asks gin.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import gin

from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig, RetrieveConfig
from atlas_jax.answering.leaks import LeakConfig
from atlas_jax.answering.run import AnswerRun, IndexRun, RetrieveRun
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.config import config_text
from atlas_jax.core.devices import Devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.core.partitioning import MeshConfig, PartitionRules
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec
from atlas_jax.corpus.corpus import fitted
from atlas_jax.datasets.tokenizer_training import train_tokenizers
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.refresh import RefreshPolicy
from atlas_jax.index.scann_search import ScannConfig
from atlas_jax.index.staleness import StalenessConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.models.parameters import Models
from atlas_jax.planning.run import Entry, Run
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.contrastive import ContrastiveConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import Task
from atlas_jax.tasks.registry import TASKS, task_class
from atlas_jax.training.config import (
    CheckpointConfig,
    RetrieverTrainConfig,
    StepConfig,
    TrainConfig,
)
from atlas_jax.training.optimizers import OptimizerConfig, make_optimizer
from atlas_jax.training.run import RetrieverRun, TrainRun
from atlas_jax.training.speed import ProfileConfig

Config = TypeVar("Config")
Result = TypeVar("Result")

# Functions and classes that gin files bind by name. They are not changed: only `told` and `called`
# take their arguments from gin.
CONFIGURABLES = (
    CheckpointConfig, CompilerConfig, ContrastiveConfig, CorpusConfig, DataConfig,
    DistillationConfig, EvalConfig, GenerationConfig, LeakConfig, MeshConfig, ModelConfig,
    OptimizerConfig, PartitionRules, ProfileConfig, ReaderConfig, RefreshPolicy, RetrieveConfig,
    RetrieverConfig, RetrieverTrainConfig, RowsConfig, ScannConfig, StalenessConfig, StepConfig,
    StoreConfig, TrainConfig, train_tokenizers, *TASKS.values(),
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
        return gin.get_configurable(config)()


def called(function: Callable[..., Result], **given: Any) -> Result:
    """Call a function with the arguments bound in gin and those given here."""
    configured: Callable[..., Result] = gin.get_configurable(function)
    return configured(**given)


def fields_told(config: type[Any]) -> dict[str, Any]:
    """Only the fields of a config that are bound in gin."""
    return dict(gin.get_bindings(config))


def task(name: str) -> Task:
    """The task of this name, with the fields bound in gin.

    Raises:
      UserError: there is no such task, or a field is at fault.
    """
    found: Any = task_class(name)
    try:
        made = gin.get_configurable(found)
    except ValueError:  # of somebody's own, and not for gin
        made = found
    return made()


def devices() -> Devices:
    """Mesh, rules and compiler."""
    return Devices(told(MeshConfig), told(PartitionRules), told(CompilerConfig))


def models() -> ModelSpec:
    """Where the two models come from."""
    return ModelSpec(told(ModelConfig), fields_told(ReaderConfig), fields_told(RetrieverConfig))


def corpus() -> CorpusSpec:
    """Which passages are searched, and how; the models bound their lengths.

    Raises:
      UserError: a setting, or the retriever's folder, is at fault.
    """
    spec = CorpusSpec(told(CorpusConfig), told(StoreConfig), told(ScannConfig), told(RowsConfig))
    return fitted(spec, models(), told(DataConfig).retriever_query_length)


def index_run() -> IndexRun:
    """The settings of `build_index`."""
    return IndexRun(models(), corpus(), devices())


def retrieve_run() -> RetrieveRun:
    """The settings of `retrieve`."""
    config = told(RetrieveConfig)
    return RetrieveRun(
        models=models(),
        corpus=corpus(),
        retrieve=config,
        task=task(config.task),
        data=told(DataConfig),
        recall_at=told(EvalConfig).recall_at,
        rows=told(RowsConfig),
        devices=devices(),
    )


def answer_run() -> AnswerRun:
    """The settings of `evaluate` and `ask`."""
    config = told(EvalConfig)
    return AnswerRun(
        models=models(),
        corpus=corpus(),
        evaluation=config,
        task=task(config.task),
        read=told(StepConfig),
        data=told(DataConfig),
        generation=told(GenerationConfig),
        rows=told(RowsConfig),
        devices=devices(),
    )


def train_run() -> TrainRun:
    """The settings of `train` and `doctor`."""
    config, evaluation = told(TrainConfig), told(EvalConfig)
    return TrainRun(
        train=config,
        task=task(config.task),
        models=models(),
        corpus=corpus(),
        eval_task=task(evaluation.task),
        step=told(StepConfig),
        data=told(DataConfig),
        distillation=told(DistillationConfig),
        optimizers={part: told(OptimizerConfig, part) for part in PARTS},
        refresh=told(RefreshPolicy),
        staleness=told(StalenessConfig),
        checkpoints=told(CheckpointConfig),
        profile=told(ProfileConfig),
        evaluation=evaluation,
        generation=told(GenerationConfig),
        rows=told(RowsConfig),
        devices=devices(),
        text=config_text(),
    )


def retriever_run() -> RetrieverRun:
    """The settings of `train_retriever`."""
    config = told(RetrieverTrainConfig)
    return RetrieverRun(
        train=config,
        models=models(),
        corpus=corpus(),
        task=task(config.task) if config.task else None,
        data=told(DataConfig),
        contrastive=told(ContrastiveConfig),
        optimizer=told(OptimizerConfig, "retriever"),
        checkpoints=told(CheckpointConfig),
        profile=told(ProfileConfig),
        rows=told(RowsConfig),
        devices=devices(),
        text=config_text(),
    )


def plan_run(passages: int) -> Run:
    """The settings of a plan; no file is read.

    Args:
      passages: how many passages will be searched.

    Raises:
      UserError: the sizes of the reader are not bound, or the run is of a command that has no plan.
    """
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
    return Run(
        entry=entry,
        refreshes=refreshes,
        evaluates=entry == "evaluate" or bool(evaluation.file),
        models=Models(T5(told(ReaderConfig)), DualEncoder(retriever)),
        step=step,
        distillation=told(DistillationConfig),
        optimizers={part: make_optimizer(told(OptimizerConfig, part)) for part in PARTS},
        data=told(DataConfig),
        store=told(StoreConfig).fitted(retriever.max_length),
        corpus=told(CorpusConfig),
        generation=told(GenerationConfig),
        answer_batch=evaluation.batch_size,
        answer_k=answer_k,
        answer_depth=max(*evaluation.recall_at, answer_k) if evaluation.recall_at else answer_k,
        passage_source=source,
        passages=passages,
        rules=tuple(told(PartitionRules).rules),
    )


# Their step or batch is none of the programs that are planned.
_UNPLANNED = {RetrieverTrainConfig: "train_retriever", RetrieveConfig: "retrieve"}


def _entry() -> Entry:
    """The entry point that the bindings are for."""
    for config, command in _UNPLANNED.items():
        if fields_told(config):
            raise UserError(
                f"{config.__name__} is bound, so this is a run of `{command}`, which has no plan; "
                "those of `train`, `evaluate` and `build_index` have"
            )
    if fields_told(TrainConfig):
        return "train"
    return "evaluate" if fields_told(EvalConfig) else "build_index"
