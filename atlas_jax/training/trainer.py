"""The training run: one linear loop over batches.

A checkpoint holds all that the loop changes: the train state, the place in the data, and the index
(its version or its embeddings). So a run that was killed and resumed gives the same bits as one
that was never interrupted.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, Sharding

from atlas_jax.answering.batcher import Batcher
from atlas_jax.answering.defaults import checked_formats
from atlas_jax.answering.evaluation import Evaluation, make_evaluation
from atlas_jax.answering.evaluator import write_predictions
from atlas_jax.answering.truncation import evenly, tell_cut
from atlas_jax.core import trees
from atlas_jax.core.config import write_config
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.in_step import InStep
from atlas_jax.core.multihost import is_first, local_rows, of_first, place_rows
from atlas_jax.core.objects import place_of
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.parts import PARTS
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.preemption import Preempted, Preemption
from atlas_jax.core.types import Batch, Params
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.opening import make_corpus, open_store
from atlas_jax.corpus.reader_states import PassageReader, reader_states
from atlas_jax.corpus.rounding import settled
from atlas_jax.corpus.sources import Source, make_source
from atlas_jax.index.int8 import INT8
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import (
    Tokenizers,
    expectations,
    export_model,
    initial_params,
    load_tokenizers,
    open_models,
)
from atlas_jax.models.expects import Expects
from atlas_jax.models.parameters import Models
from atlas_jax.tasks.base import Example
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.checkpoint import Checkpointer, Restored
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.config import (
    CHECKPOINTS,
    CONFIG_FILE,
    FINAL,
    FINAL_INDEX,
    INDEX,
    PREDICTIONS,
    StepConfig,
)
from atlas_jax.training.data import training_batches
from atlas_jax.training.exporting import written_in_part
from atlas_jax.training.freshness import Freshness, check_freshness
from atlas_jax.training.metrics import RunLog
from atlas_jax.training.moments import taken_over
from atlas_jax.training.optimizers import make_optimizer, make_schedule
from atlas_jax.training.packed_step import packed_step
from atlas_jax.training.provenance import check_learnt, check_resumed, file_mark
from atlas_jax.training.run import TrainRun, retrieves
from atlas_jax.training.speed import TRACES, Sizes, Speed, StepClock, Tracer, step_speed
from atlas_jax.training.state import (
    TrainState,
    abstract_state,
    make_state,
    split_trainable,
    state_shardings,
    what_trains,
)
from atlas_jax.training.step import compile_train_step, make_train_step

_CHECKED = 100_000  # training records that are checked before the first step


@dataclasses.dataclass(frozen=True)
class _Run:
    """The objects that stay the same during the loop.

    Attributes:
      told: everything that the run was told, with the number of packed rows that it takes.
      shapes: of the state, with shardings; a checkpoint is read into them.
      begin: makes the state of a run that has no checkpoint: reads or draws the parameters.
      place: a process's rows of a batch -> the batch on the mesh.
      corpus: None if neither training nor evaluation searches.
      freshness: None if training does not search.
      evaluation: None without EvalConfig.file.
      settings: those that decide the order of the records, by binding.
      expects: what the trained models will expect to read.
    """

    told: TrainRun
    directory: Path
    models: Models
    tokenizers: Tokenizers
    shapes: TrainState
    begin: Callable[[], TrainState]
    corpus: Corpus | None
    freshness: Freshness | None
    source: Source
    batches: Any
    place: Callable[[Batch], Batch]
    step: CompiledOnce
    schedules: Mapping[str, optax.Schedule]
    evaluation: Evaluation | None
    checkpoints: Checkpointer
    settings: Mapping[str, Any]
    expects: Expects


def train(told: TrainRun) -> TrainState:
    """Train until `total_steps`; continue from the run's last checkpoint if there is one.

    At the end the model folder `model_dir/final` is written, and `model_dir/final_index` if the
    index was refreshed during training.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    total = told.train.total_steps
    if retrieves(told.train, told.evaluation):
        formats = checked_formats(told.models, told.corpus.formats, told.data)
        told = dataclasses.replace(told, corpus=dataclasses.replace(told.corpus, formats=formats))
    with use_devices(told.devices) as (mesh, rules):
        run = _prepare(told, mesh, rules)
        with run.checkpoints:
            state = _begin_or_resume(run)
            if is_first():
                write_config(run.directory / CONFIG_FILE, told.text or as_gin(told))
            with RunLog(run.directory, int(state.step), total, is_first()) as log:
                tracer = Tracer(told.profile, str(run.directory / TRACES))
                with Preemption() as preemption, tracer:
                    state = _loop(run, state, log, preemption, tracer)
                check_learnt(int(state.step), int(state.skipped))
                _export(run, state)  # before an evaluation, which may fail
                if run.corpus is not None and told.refreshes_index:  # for the evaluation, too
                    run.corpus.refresh(state.params["retriever"], run.directory / FINAL_INDEX)
                if run.evaluation is not None:
                    _evaluate(run, run.evaluation, state.params, total, log)
    return state


def _export(run: _Run, state: TrainState) -> None:
    """Write the trained models; what began as a folder's and trained in part, in part."""
    told, models = run.told, run.models
    moving, frozen = split_trainable(state.params, what_trains(told.step, models))
    config, chosen = told.models.config, bool(told.step.train)
    partial = written_in_part(config, models, moving, frozen, chosen)
    export_model(
        run.directory / FINAL,
        models,
        state.params,
        run.tokenizers,
        config.export_dtype,
        about={
            "steps": int(state.step),
            "skipped": int(state.skipped),
            "trained": trees.count(moving),
            "parameters": trees.count(state.params),
        },
        expects=run.expects,
        partial=partial,
    )


def _prepare(told: TrainRun, mesh: Mesh, rules: tuple[Rule, ...]) -> _Run:
    """Everything that a run needs but its state."""
    _check(told)
    directory = check_output_folder(told.train.model_dir, "TrainConfig.model_dir")
    config, step_config = told.train, told.step
    # Files first: faults in them are found before anything is compiled.
    records = told.task.load(config.file, rows=told.rows)
    rows = batch_sharding("DataConfig.batch_size", told.data.batch_size, mesh, rules)
    store = None
    if told.searches:
        store = open_store(told.corpus, load_tokenizers(told.models.config))
    models, tokenizers = open_models(told.models, step_config.retriever_training)
    width = models.retriever.config.embedding_dim
    step_config = settled(step_config, told.corpus.config, store, width)
    told, corpus = dataclasses.replace(told, step=step_config), None
    if store is not None:
        corpus = _corpus_of(told, store, models, tokenizers, mesh, rules)
    source = make_source(
        config.passages,
        corpus,
        step_config.searched,
        "StepConfig.rerank" if step_config.rerank > 0 else "StepConfig.k",
        models.retriever,
        mesh,
    )
    optimizers = {part: make_optimizer(told.optimizers[part]) for part in PARTS}
    shaping = (optimizers, what_trains(step_config, models))
    step_config = packed_step(told, records, models, tokenizers, store)
    step = make_train_step(
        models,
        step_config,
        told.distillation,
        optimizers,
        source.retrieve,
        told.optimizers["retriever"].frozen_steps,
    )
    shardings = state_shardings(models, *shaping, mesh, rules)
    evaluation = None
    if told.evaluation.file:
        evaluation = make_evaluation(told.answers, models, tokenizers, corpus, mesh, rules)

    def begin() -> TrainState:
        params = initial_params(told.models, models, mesh, rules, config.seed)
        state = make_state(models, params, *shaping, config.seed, mesh, rules)
        source = told.models.config
        return taken_over(state, source) if source.optimizer_state else state

    return _Run(
        told=dataclasses.replace(told, step=step_config),
        directory=directory,
        models=models,
        tokenizers=tokenizers,
        shapes=abstract_state(models, *shaping, mesh, rules),
        begin=begin,
        corpus=corpus,
        freshness=Freshness(told, corpus, models.retriever, mesh)
        if corpus is not None and config.passages == "index"
        else None,
        source=source,
        batches=InStep(
            f"batches of {config.file}", _batches(told, records, tokenizers, store, rows)
        ),
        place=functools.partial(place_rows, sharding=rows, rows=told.data.batch_size),
        step=CompiledOnce(
            compile_train_step(step, shardings, mesh, rules),
            *("state", "source", "batch"),
            smaller="DataConfig.batch_size (BATCH_SIZE) or StepConfig.k (K)",
        ),
        schedules={part: make_schedule(told.optimizers[part]) for part in PARTS},
        evaluation=evaluation,
        checkpoints=Checkpointer(directory / CHECKPOINTS, told.checkpoints),
        settings={
            "DataConfig.batch_size": told.data.batch_size,
            "TrainConfig.seed": config.seed,
            "TrainConfig.file": file_mark(config.file),
        },
        expects=told.taught(expectations(told.models.config), store.config if store else None),
    )


def _begin_or_resume(run: _Run) -> TrainState:
    """The last checkpoint's state, place in the data and index; without one a new state.

    What the run began with is not read once there is a checkpoint.
    """
    found = run.checkpoints.restore(run.shapes)
    if found is None:
        state = run.begin()
    else:
        check_resumed(found.notes.get("settings"), run.settings, str(run.directory))
        state = found.state
        run.checkpoints.resume_data(run.batches, found)
    if run.corpus is not None:
        _load_index(run, state.params, found)
        check_rerank(run.told.step, run.corpus.dtype)
    return state


def _loop(
    run: _Run, state: TrainState, log: RunLog, preemption: Preemption, tracer: Tracer
) -> TrainState:
    """Take the steps that are left.

    Raises:
      Preempted: the machine is about to be taken away; the last step is saved.
    """
    config, saving, first = run.told.train, run.told.checkpoints, int(state.step)
    due = first > 0 and _due(config.eval_every, first)
    if run.evaluation is not None and due and not _is_evaluated(run, first):
        _evaluate(run, run.evaluation, state.params, first, log)  # the run was ended before it
    clock, speed = StepClock(), None
    for step in range(first + 1, config.total_steps + 1):
        tracer.before(step)
        batch = run.place(next(run.batches))
        if run.freshness is not None:
            _freshen(run.freshness, step, state, batch, log, clock)
        state, metrics = run.step(step, state, run.source.of_batch(state.params, batch), batch)
        clock.stepped(metrics)
        tracer.after(step, metrics)
        log.advance()
        last = step == config.total_steps
        if step % config.log_every == 0 or last:
            values = dict(jax.device_get(metrics))  # waits for the step
            speed = speed or _speed(run, state.params, batch)
            values |= speed.of(clock.lap())
            log.write(step, "train", {**values, **_settings(run, step)})
        stopping = preemption.reached(step) and not last
        if _due(saving.every, step) or last or stopping:
            with clock.paused(state):
                _save(run, step, state)
        if stopping:
            run.checkpoints.close()
            raise Preempted(f"stopped at step {step}, which is saved; start it again to go on")
        if run.evaluation is not None and _due(config.eval_every, step) and not last:
            with clock.paused(state):
                _evaluate(run, run.evaluation, state.params, step, log)
    return state


def _freshen(
    freshness: Freshness,
    step: int,
    state: TrainState,
    batch: Batch,
    log: RunLog,
    clock: StepClock,
) -> None:
    """Refresh and measure what is due before a step."""
    with clock.paused(state) if freshness.pauses(step - 1) else contextlib.nullcontext():
        measured = freshness.before_step(step - 1, state.params["retriever"], batch)
        if measured:
            log.write(step, "index", measured)


def _check(told: TrainRun) -> None:
    """Refuse settings that contradict each other; the error names their bindings."""
    config, step = told.train, told.step
    training = step.retriever_training
    if config.passages == "none" and training != "fixed":
        raise UserError(
            f"StepConfig.retriever_training = {training!r}: without passages "
            "(TrainConfig.passages = 'none') it has to be 'fixed'"
        )
    if step.rerank > 0 and config.passages != "index":
        raise UserError(
            f"StepConfig.rerank = {step.rerank}: TrainConfig.passages = {config.passages!r} "
            "searches nothing; bind it to 0"
        )
    check_freshness(told)


def check_rerank(step: StepConfig, dtype: str) -> None:
    """Refuse to re-rank passages in training that the search has already ranked exactly.

    Args:
      dtype: of the index.

    Raises:
      UserError: names the binding.
    """
    if step.rerank and step.retriever_training != "joint" and dtype != INT8:
        raise UserError(
            f"StepConfig.rerank = {step.rerank} changes nothing: an index in {dtype} is exact "
            f"with StepConfig.retriever_training = {step.retriever_training!r}; bind it to 0"
        )


def _corpus_of(
    told: TrainRun,
    store: PassageStore,
    models: Models,
    tokenizers: Tokenizers,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Corpus:
    """The corpus of the store; its index and the reader's states are loaded later."""
    directory = told.train.model_dir
    return make_corpus(
        told.corpus,
        store,
        models.retriever,
        tokenizers.retriever,
        mesh,
        rules,
        told.step.embeds_passages,
        models.reader,
        versions=place_of(directory) / INDEX,
    )


def _load_index(run: _Run, params: Params, found: Restored | None) -> None:
    """Load the index: a new run's first, or the one that the checkpoint was searching."""
    corpus, told = run.corpus, run.told
    assert corpus is not None
    lengths = told.step.reader_length, told.data.query_length
    reader = PassageReader(run.models.reader, params["reader"], *lengths)
    corpus.states = reader_states(told.corpus.config, reader)
    if found is None:
        corpus.load_first(params["retriever"])
    elif (notes := found.notes["index"]) is not None:
        corpus.load_noted(notes, functools.partial(run.checkpoints.restore_index, found.step))
        if run.freshness is not None:
            run.freshness.set_notes(notes)
    else:
        raise UserError(
            "the checkpoint is of a run that searched no index; begin a new one in another "
            "TrainConfig.model_dir"
        )


def _batches(
    told: TrainRun,
    records: Sequence[Any],
    tokenizers: Tokenizers,
    store: PassageStore | None,
    rows: Sharding,
) -> Any:
    """The resumable iterator over this process's rows of each batch."""
    config, data = told.train, told.data
    batcher = Batcher(
        tokenizers,
        data,
        store,
        given_passages=told.step.k if config.passages == "file" else 0,
        formats=told.corpus.formats,
    )
    examples = [told.task.example(records[row]) for row in evenly(len(records), _CHECKED)]
    batcher.check(examples, config.file)
    tell_cut(config.file, examples, tokenizers, data, learnt=True)

    def batch_of(examples: Sequence[Example]) -> Batch:
        try:
            return batcher(examples)
        except UserError as error:  # in a record that was not among the checked ones
            raise UserError(f"{config.file}: {error}") from error

    return training_batches(
        told.task,
        records,
        batch_of,
        data.batch_size,
        config.seed,
        local_rows(rows, data.batch_size),
    )


def _speed(run: _Run, params: Params, batch: Batch) -> Speed:
    """The `Speed` of a step, which turns its time into rates."""
    told, models = run.told, run.models
    closed_book = told.train.passages == "none"
    sizes = Sizes(
        trains=what_trains(told.step, models),
        reader_length=told.step.reader_length,
        k=1 if closed_book else told.step.k,
        packed_rows=told.step.packed_rows,
        packed_passages=told.step.packed_passages,
        passage=0 if closed_book else told.corpus.formats.retriever_length,
    )
    return step_speed(params, batch, sizes, models.retriever.config.tower.uses, told.profile)


def _settings(run: _Run, step: int) -> dict[str, float]:
    """Learning rates and the like, which are logged with a step's metrics."""
    rates = {f"{part}_learning_rate": float(run.schedules[part](step - 1)) for part in PARTS}
    return rates | ({"index_version": run.corpus.version} if run.corpus else {})


def _save(run: _Run, step: int, state: TrainState) -> None:
    """Write a checkpoint, and drop the embeddings that no checkpoint needs."""
    data = run.batches.get_state()
    notes: dict[str, Any] = {"data": data, "index": None, "settings": dict(run.settings)}
    if run.corpus is not None:
        notes["index"] = run.corpus.notes() | (run.freshness.notes() if run.freshness else {})
    embeddings = run.corpus.own_embeddings if run.corpus else None
    # Before the new one begins: while it is written, the oldest one may be deleted.
    saved = run.checkpoints.steps() if run.corpus is not None else []
    noted = [run.checkpoints.read_notes(earlier)["index"] for earlier in saved]
    run.checkpoints.save(step, state, notes, embeddings)
    if run.corpus is not None:
        run.corpus.keep_versions({one["version"] for one in noted if one})


def _evaluate(run: _Run, evaluation: Evaluation, params: Params, step: int, log: RunLog) -> None:
    """Score the evaluation file and write its predictions."""
    found, scores = evaluation.run(params)
    if is_first():
        write_predictions(_predictions(run, step), evaluation.task, found)
    log.write(step, "eval", scores)


def _predictions(run: _Run, step: int) -> Path:
    return run.directory / PREDICTIONS / f"step_{step:07d}.jsonl"


def _is_evaluated(run: _Run, step: int) -> bool:
    return bool(of_first(_predictions(run, step).exists()))


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
