"""The training run: one linear loop over batches.

A checkpoint holds all that the loop changes: the train state, the place in the data and
which version of the index is searched. So a run that was killed repeats the uninterrupted
one bit for bit.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import optax
from jax.sharding import Mesh

from atlas_jax.core.config import dump_config
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.types import Params
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.refresh import RefreshPolicy, parse_schedule
from atlas_jax.tasks.registry import get_task
from atlas_jax.training.assembly import (
    Tokenizers,
    active_mesh,
    assemble,
    batch_sharding,
    export_model,
    load_tokenizers,
)
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.config import (
    CHECKPOINTS,
    CONFIG_FILE,
    FINAL,
    FINAL_INDEX,
    INDEX,
    PREDICTIONS,
    CheckpointConfig,
    CorpusConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
)
from atlas_jax.training.corpus import Corpus, Embedder, open_store
from atlas_jax.training.data import Batcher, DataConfig, training_batches
from atlas_jax.training.evaluator import Evaluation, make_evaluation, write_predictions
from atlas_jax.training.metrics import RunLog
from atlas_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from atlas_jax.training.sources import make_source
from atlas_jax.training.state import PARTS, Models, TrainState, make_state, state_shardings
from atlas_jax.training.step import StepConfig, compile_train_step, make_train_step


def train(config: TrainConfig) -> TrainState:
    """Train until `total_steps`, going on from the run's last checkpoint if there is one.

    Every other config comes from gin. The run ends with the model folder
    `model_dir/final`, and `model_dir/final_index` if the index was refreshed on the way.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    directory = Path(config.model_dir)
    step_config, saving, policy = StepConfig(), CheckpointConfig(), RefreshPolicy()
    refreshes = bool(parse_schedule(policy.schedule))
    _check(config, step_config, refreshes)
    # Files first: what is wrong with them shows before anything is compiled.
    records = get_task(config.task).load(config.file)
    with active_mesh() as (mesh, rules):
        rows = batch_sharding("DataConfig.batch_size", DataConfig().batch_size, mesh, rules)
        model_config = ModelConfig()
        store = _open_store(config, load_tokenizers(model_config))
        made = assemble(model_config, mesh, rules, config.seed, step_config.retriever_training)
        models, tokenizers = made.models, made.tokenizers
        corpus = (
            None if store is None else _make_corpus(config, store, models, tokenizers, mesh, rules)
        )
        source = make_source(
            config.passages, corpus, step_config.k, "StepConfig.k", models.retriever, mesh
        )
        optimizers, schedules = _optimizers()
        shaping = (optimizers, step_config.retriever_training)
        state = make_state(models, made.params, *shaping, config.seed, mesh, rules)
        del made  # its parameters have been copied
        step_fn = compile_train_step(
            make_train_step(models, step_config, DistillationConfig(), optimizers, source.retrieve),
            state_shardings(models, *shaping, mesh, rules),
            mesh,
            rules,
        )
        batches = _batches(config, step_config, records, tokenizers, store)
        place = functools.partial(jax.make_array_from_process_local_data, rows)
        evaluation = None
        if EvalConfig().file:
            evaluation = make_evaluation(
                EvalConfig(), step_config, models, tokenizers, corpus, mesh, rules
            )

        checkpoints = Checkpointer(directory / CHECKPOINTS, saving)
        found = checkpoints.restore(state)
        if found is not None:
            state = found.state
            batches.set_state(found.notes["data"])
        if corpus is not None:
            _load_index(corpus, state.params, found.notes if found else None)
        writes = jax.process_index() == 0
        if writes:
            dump_config(directory / CONFIG_FILE)

        first = int(state.step)
        with RunLog(directory, first, config.total_steps, writes) as log:
            clock, counted = time.monotonic(), first
            for step in range(first + 1, config.total_steps + 1):
                if corpus is not None and policy.due(step - 1):
                    corpus.refresh(state.params["retriever"])
                batch = jax.tree.map(place, next(batches))
                state, metrics = step_fn(state, source.of_batch(state.params, batch), batch)
                log.advance()
                last = step == config.total_steps
                if step % config.log_every == 0 or last:
                    values = dict(jax.device_get(metrics))
                    now = time.monotonic()
                    values["seconds_per_step"] = (now - clock) / (step - counted)
                    clock, counted = now, step
                    log.write(step, "train", {**values, **_settings(schedules, step, corpus)})
                if _due(saving.every, step) or last:
                    _save(checkpoints, step, state, batches.get_state(), corpus)
                if evaluation is not None and _due(config.eval_every, step) and not last:
                    _evaluate(evaluation, state.params, step, directory, log)
            if corpus is not None and refreshes:  # for the last evaluation, and to keep
                corpus.refresh(state.params["retriever"], directory / FINAL_INDEX)
            if evaluation is not None:
                _evaluate(evaluation, state.params, config.total_steps, directory, log)
        checkpoints.close()
        about = {"steps": int(state.step), "skipped": int(state.skipped)}
        export_model(
            directory / FINAL, models, state.params, tokenizers, ModelConfig().export_dtype, about
        )
    return state


def _check(config: TrainConfig, step: StepConfig, refreshes: bool) -> None:
    """Refuse settings that contradict each other, naming their bindings."""
    training = step.retriever_training
    if config.passages == "none" and training != "fixed":
        raise UserError(
            f"StepConfig.retriever_training = {training!r}: without passages "
            "(TrainConfig.passages = 'none') it has to be 'fixed'"
        )
    if refreshes and (config.passages != "index" or training != "joint"):
        raise UserError(
            "RefreshPolicy.schedule refreshes the index, but nothing makes it stale: "
            f"TrainConfig.passages = {config.passages!r}, StepConfig.retriever_training = "
            f"{training!r}; bind RefreshPolicy.schedule = '-1'"
        )


def _open_store(config: TrainConfig, tokenizers: Tokenizers) -> PassageStore | None:
    """The store, if training or its evaluation searches one."""
    evaluation = EvalConfig()
    if config.passages != "index" and not (evaluation.file and evaluation.passages == "index"):
        return None
    return open_store(CorpusConfig(), tokenizers)


def _make_corpus(
    config: TrainConfig,
    store: PassageStore,
    models: Models,
    tokenizers: Tokenizers,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Corpus:
    """The corpus of the store; its index is loaded later."""
    store.check_vocab(models.reader.config.vocab_size, models.retriever.config.vocab_size)
    embedder = Embedder(models.retriever, tokenizers.retriever, CorpusConfig(), mesh, rules)
    return Corpus(store, embedder, CorpusConfig(), mesh, Path(config.model_dir) / INDEX)


def _load_index(corpus: Corpus, params: Params, notes: Mapping[str, Any] | None) -> None:
    """The first index of a new run, or the one that the checkpoint was searching."""
    if notes is None:
        corpus.load_first(params["retriever"])
    elif notes["index"] is not None:
        corpus.load_version(notes["index"]["version"], notes["index"]["encoder_hash"])
    else:
        raise UserError(
            "the checkpoint is of a run that searched no index; begin a new one in another "
            "TrainConfig.model_dir"
        )


def _optimizers() -> tuple[dict[str, optax.GradientTransformation], dict[str, optax.Schedule]]:
    optimizers, schedules = {}, {}
    for part in PARTS:
        with gin.config_scope(part):
            config = OptimizerConfig()
        optimizers[part], schedules[part] = make_optimizer(config), make_schedule(config)
    return optimizers, schedules


def _batches(
    config: TrainConfig,
    step: StepConfig,
    records: Sequence[Any],
    tokenizers: Tokenizers,
    store: PassageStore | None,
) -> Any:
    """The resumable iterator over this process's part of each batch."""
    data = DataConfig()
    batcher = Batcher(
        tokenizers,
        data,
        store,
        given_passages=step.k if config.passages == "file" else 0,
    )
    return training_batches(
        get_task(config.task),
        records,
        batcher,
        data.batch_size,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )


def _settings(
    schedules: Mapping[str, optax.Schedule], step: int, corpus: Corpus | None
) -> dict[str, float]:
    """What of the step's circumstances is worth logging beside its metrics."""
    rates = {f"{part}_learning_rate": float(schedules[part](step - 1)) for part in PARTS}
    return rates | ({"index_version": corpus.version} if corpus else {})


def _save(
    checkpoints: Checkpointer,
    step: int,
    state: TrainState,
    data_state: dict[str, Any],
    corpus: Corpus | None,
) -> None:
    """Write a checkpoint, then drop the embeddings that no checkpoint left needs."""
    index = None
    if corpus is not None:
        index = {"version": corpus.version, "encoder_hash": corpus.encoder_hash}
    checkpoints.save(step, state, {"data": data_state, "index": index})
    if corpus is not None:
        noted = [checkpoints.read_notes(saved)["index"] for saved in checkpoints.steps()]
        corpus.keep_versions({one["version"] for one in noted if one})


def _evaluate(
    evaluation: Evaluation, params: Params, step: int, directory: Path, log: RunLog
) -> None:
    """Score the evaluation file and write its predictions."""
    found, scores = evaluation.run(params)
    if jax.process_index() == 0:
        write_predictions(directory / PREDICTIONS / f"step_{step:07d}.jsonl", found)
    log.write(step, "eval", scores)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
