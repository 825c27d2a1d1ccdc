"""The training run: one linear loop over batches.

A checkpoint holds all that the loop changes: the train state, the place in the data and
which version of the index is searched. So a run that was killed repeats the uninterrupted
one bit for bit.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from atlas_jax.core.config import dump_config
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.types import Batch, Params
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
from atlas_jax.training.moments import taken_over
from atlas_jax.training.optimizers import configured_optimizers
from atlas_jax.training.sources import Source, make_source
from atlas_jax.training.state import PARTS, Models, TrainState, make_state, state_shardings
from atlas_jax.training.step import Metrics, StepConfig, compile_train_step, make_train_step


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the loop works with and does not replace.

    Attributes:
      place: a process's part of an array of the batch -> the array on the mesh.
      corpus: None where nothing is searched, in training or evaluation.
      evaluation: None without EvalConfig.file.
    """

    directory: Path
    models: Models
    tokenizers: Tokenizers
    corpus: Corpus | None
    source: Source
    batches: Any
    place: Callable[[Any], jax.Array]
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
    schedules: Mapping[str, optax.Schedule]
    evaluation: Evaluation | None
    checkpoints: Checkpointer


def train(config: TrainConfig) -> TrainState:
    """Train until `total_steps`, going on from the run's last checkpoint if there is one.

    Every other config comes from gin. The run ends with the model folder
    `model_dir/final`, and `model_dir/final_index` if the index was refreshed on the way.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    with active_mesh() as (mesh, rules):
        run, state = _prepare(config, mesh, rules)
        state = _resume(run, state)
        writes = jax.process_index() == 0
        if writes:
            dump_config(run.directory / CONFIG_FILE)
        with RunLog(run.directory, int(state.step), config.total_steps, writes) as log:
            state = _loop(config, run, state, log)
            if run.corpus is not None and _refreshes():  # for the last evaluation, and to keep
                run.corpus.refresh(state.params["retriever"], run.directory / FINAL_INDEX)
            if run.evaluation is not None:
                _evaluate(run, run.evaluation, state.params, config.total_steps, log)
        run.checkpoints.close()
        export_model(
            run.directory / FINAL,
            run.models,
            state.params,
            run.tokenizers,
            ModelConfig().export_dtype,
            about={"steps": int(state.step), "skipped": int(state.skipped)},
        )
    return state


def _prepare(config: TrainConfig, mesh: Mesh, rules: tuple[Rule, ...]) -> tuple[_Run, TrainState]:
    """Everything that a run needs, and its state before the first step."""
    step_config, model_config = StepConfig(), ModelConfig()
    _check(config, step_config)
    # Files first: what is wrong with them shows before anything is compiled.
    records = get_task(config.task).load(config.file)
    rows = batch_sharding("DataConfig.batch_size", DataConfig().batch_size, mesh, rules)
    store = _open_store(config, load_tokenizers(model_config))
    made = assemble(model_config, mesh, rules, config.seed, step_config.retriever_training)
    models, tokenizers, corpus = made.models, made.tokenizers, None
    if store is not None:
        corpus = _make_corpus(config, store, models, tokenizers, mesh, rules)
    source = make_source(
        config.passages, corpus, step_config.k, "StepConfig.k", models.retriever, mesh
    )
    optimizers, schedules = configured_optimizers(PARTS)
    shaping = (optimizers, step_config.retriever_training)
    step = make_train_step(models, step_config, DistillationConfig(), optimizers, source.retrieve)
    shardings = state_shardings(models, *shaping, mesh, rules)
    evaluation = None
    if EvalConfig().file:
        evaluation = make_evaluation(
            EvalConfig(), step_config, models, tokenizers, corpus, mesh, rules
        )
    directory = Path(config.model_dir)
    run = _Run(
        directory=directory,
        models=models,
        tokenizers=tokenizers,
        corpus=corpus,
        source=source,
        batches=_batches(config, step_config, records, tokenizers, store),
        place=functools.partial(jax.make_array_from_process_local_data, rows),
        step=compile_train_step(step, shardings, mesh, rules),
        schedules=schedules,
        evaluation=evaluation,
        checkpoints=Checkpointer(directory / CHECKPOINTS, CheckpointConfig()),
    )
    state = make_state(models, made.params, *shaping, config.seed, mesh, rules)
    return run, taken_over(state, model_config) if model_config.optimizer_state else state


def _resume(run: _Run, state: TrainState) -> TrainState:
    """The last checkpoint's state, place in the data and index; `state` without one."""
    found = run.checkpoints.restore(state)
    if found is not None:
        state = found.state
        run.batches.set_state(found.notes["data"])
    if run.corpus is not None:
        _load_index(run.corpus, state.params, found.notes if found else None)
    return state


def _loop(config: TrainConfig, run: _Run, state: TrainState, log: RunLog) -> TrainState:
    """Take the steps that are left."""
    policy, saving, first = RefreshPolicy(), CheckpointConfig(), int(state.step)
    clock, counted = time.monotonic(), first
    for step in range(first + 1, config.total_steps + 1):
        if run.corpus is not None and policy.due(step - 1):
            run.corpus.refresh(state.params["retriever"])
        batch = jax.tree.map(run.place, next(run.batches))
        state, metrics = run.step(state, run.source.of_batch(state.params, batch), batch)
        log.advance()
        last = step == config.total_steps
        if step % config.log_every == 0 or last:
            values = dict(jax.device_get(metrics))  # waits for the step
            now = time.monotonic()
            values["seconds_per_step"] = (now - clock) / (step - counted)
            clock, counted = now, step
            log.write(step, "train", {**values, **_settings(run, step)})
        if _due(saving.every, step) or last:
            _save(run, step, state)
        if run.evaluation is not None and _due(config.eval_every, step) and not last:
            _evaluate(run, run.evaluation, state.params, step, log)
    return state


def _refreshes() -> bool:
    return bool(parse_schedule(RefreshPolicy().schedule))


def _check(config: TrainConfig, step: StepConfig) -> None:
    """Refuse settings that contradict each other, naming their bindings."""
    training = step.retriever_training
    if config.passages == "none" and training != "fixed":
        raise UserError(
            f"StepConfig.retriever_training = {training!r}: without passages "
            "(TrainConfig.passages = 'none') it has to be 'fixed'"
        )
    if _refreshes() and (config.passages != "index" or training != "joint"):
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


def _settings(run: _Run, step: int) -> dict[str, float]:
    """What of the step's circumstances is worth logging beside its metrics."""
    rates = {f"{part}_learning_rate": float(run.schedules[part](step - 1)) for part in PARTS}
    return rates | ({"index_version": run.corpus.version} if run.corpus else {})


def _save(run: _Run, step: int, state: TrainState) -> None:
    """Write a checkpoint, then drop the embeddings that no checkpoint left needs."""
    index = None
    if run.corpus is not None:
        index = {"version": run.corpus.version, "encoder_hash": run.corpus.encoder_hash}
    run.checkpoints.save(step, state, {"data": run.batches.get_state(), "index": index})
    if run.corpus is not None:
        noted = [run.checkpoints.read_notes(saved)["index"] for saved in run.checkpoints.steps()]
        run.corpus.keep_versions({one["version"] for one in noted if one})


def _evaluate(run: _Run, evaluation: Evaluation, params: Params, step: int, log: RunLog) -> None:
    """Score the evaluation file and write its predictions."""
    found, scores = evaluation.run(params)
    if jax.process_index() == 0:
        path = run.directory / PREDICTIONS / f"step_{step:07d}.jsonl"
        write_predictions(path, evaluation.task, found)
    log.write(step, "eval", scores)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
