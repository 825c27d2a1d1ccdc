"""LiST's self-training of a prompted encoder: few labelled texts, many without labels."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import multihost, partitioning, trees
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.types import Params
from atlas_jax.tasks.base import Record
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.classifier_scores import Classifier, score_file
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.config import FINAL
from atlas_jax.training.encoder_start import Start, about_task, export_encoder, for_task, open_start
from atlas_jax.training.encoder_state import abstract, state_shardings, trained_patterns
from atlas_jax.training.loop import Loop, run_loop
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.prompted import Asked, Texts, asked_by
from atlas_jax.training.provenance import file_mark
from atlas_jax.training.self_training_config import SelfTrainConfig, SelfTrainingRun
from atlas_jax.training.self_training_step import (
    Parts,
    Schedule,
    SelfTrainingState,
    fresh_state,
    make_self_training_step,
)

_BINDING = "SelfTrainConfig"
_HEAD = "mlm"
_SIZES = ("batch_size", "unlabelled_batch_size", "meta_batch_size")
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Run:
    """The objects that stay the same during a run; `rows` are the three batches' shardings."""

    told: SelfTrainingRun
    directory: Path
    start: Start
    patterns: tuple[str, ...]
    asked: Asked
    labelled: Texts
    unlabelled: Texts
    classifier: Classifier | None
    mesh: Mesh
    rules: tuple[Rule, ...]
    rows: tuple[NamedSharding, ...]


def self_train(told: SelfTrainingRun) -> Scores:
    """Train a teacher, then rounds of students; a run that was killed goes on inside a round.

    `model_dir/final` holds the last student, on top of the encoder that the run began with.

    Returns:
      The last student's scores on the evaluation file, empty without one.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    config = told.train
    directory = check_output_folder(config.model_dir, f"{_BINDING}.model_dir")
    with use_devices(told.devices) as (mesh, rules):
        run = _prepare(told, directory, mesh, rules)
        scores: Scores = {}
        logits = run.classifier.logits(run.asked.logits) if run.classifier else None

        def evaluate(state: SelfTrainingState, step: int) -> Scores:
            assert logits is not None
            scores.update(_scored(run, logits(state.params), step))
            return scores

        run_loop(_loop(run, evaluate if logits else None))
    return scores


def schedule_of(config: SelfTrainConfig) -> Schedule:
    """The phases of a run."""
    return Schedule(
        config.teacher_steps, config.rounds, config.kd_steps, config.meta_steps, config.tune_steps
    )


def _prepare(told: SelfTrainingRun, directory: Path, mesh: Mesh, rules: tuple[Rule, ...]) -> _Run:
    """Everything that a run needs but its state. Files first: their faults are found at once."""
    config, task = told.train, told.task
    labelled = task.load(config.file, rows=told.rows)
    unlabelled = task.load(config.unlabelled_file, need_targets=False, rows=told.rows)
    evaluated: list[Record] = []
    if config.eval_file:
        evaluated = task.load(config.eval_file, need_targets=False, rows=told.rows)
    if config.leave_out_known:
        unlabelled = without_known(unlabelled, [*labelled, *evaluated], task.asks, config)
    start = open_start(
        config.encoder, config.encoder_base, told.encoder, for_task(told.delta, task), _HEAD,
        len(task.labels), task.name, config.seed, trains=True,
    )  # fmt: skip
    encoder = start.encoder
    asked = asked_by(task, encoder.model, encoder.tokenizer, True, config.length, start.soft)
    classifier = None
    if evaluated:
        size = config.eval_batch_size
        rows = batch_sharding(f"{_BINDING}.eval_batch_size", size, mesh, rules)
        classifier = Classifier(evaluated, asked.texts(evaluated), size, rows, mesh)
    return _Run(
        told=told,
        directory=directory,
        start=start,
        patterns=trained_patterns(start.shapes, config.train, (_HEAD,)),
        asked=asked,
        labelled=asked.texts(labelled),
        unlabelled=asked.texts(unlabelled),
        classifier=classifier,
        mesh=mesh,
        rules=rules,
        rows=tuple(
            batch_sharding(f"{_BINDING}.{name}", getattr(config, name), mesh, rules)
            for name in _SIZES
        ),
    )


class Files(Protocol):
    """The files that a config names."""

    @property
    def file(self) -> str:
        """Labelled lines."""

    @property
    def unlabelled_file(self) -> str:
        """Lines without labels."""

    @property
    def eval_file(self) -> str:
        """Lines to score; '' = none."""


def without_known(
    records: Sequence[Record], known: Sequence[Record], asks: Sequence[str], config: Files
) -> list[Record]:
    """The records whose text is that of no known one.

    Args:
      records: of `config.unlabelled_file`.
      known: of its other files.
      asks: names of a record's texts.
      config: names the files, for messages.

    Raises:
      UserError: none is left.
    """

    def text(record: Record) -> tuple[str, ...]:
        return tuple(" ".join(str(record.fields[name]).lower().split()) for name in asks)

    seen = {text(record) for record in known}
    kept = [record for record in records if text(record) not in seen]
    if not kept:
        raise UserError(
            f"{config.unlabelled_file}: every line is one of {config.file} or "
            f"{config.eval_file or 'the evaluation file'}, so none is left to learn from"
        )
    if len(kept) < len(records) and multihost.is_first():
        left = len(records) - len(kept)
        print(f"{config.unlabelled_file}: {left} known lines are left out", file=sys.stderr)
    return kept


def _loop(run: _Run, evaluate: Callable[[SelfTrainingState, int], Scores] | None) -> Loop:
    told, config, start = run.told, run.told.train, run.start
    schedule, parts = schedule_of(config), _parts(run)
    shardings = _shardings(run, parts)
    step = make_self_training_step(parts, schedule, config.meta_learning_rate, config.weighted)
    everywhere = partitioning.replicated(run.mesh)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))

    def fresh(params: Params) -> SelfTrainingState:
        moving, frozen = trees.split(params, run.patterns, f"{_BINDING}.train")
        return fresh_state(moving, frozen, parts, config.seed)

    decide = ("seed", *_SIZES, "teacher_steps", "kd_steps", "meta_steps", "tune_steps")
    files = {f"{_BINDING}.{name}": file_mark(getattr(config, name))
             for name in ("file", "unlabelled_file")}  # fmt: skip
    return Loop(
        directory=run.directory,
        total_steps=schedule.total,
        log_every=config.log_every,
        step=CompiledOnce(
            compiled, "state", "labelled", "unlabelled", "meta",
            smaller=f"{_BINDING}.unlabelled_batch_size",
        ),
        batches=_batches(run, schedule),
        place=functools.partial(_placed, run),
        shapes=abstract(fresh, shardings, start.shapes),
        begin=lambda: multihost.place(fresh(start.params(config.seed)), shardings),
        settings={f"{_BINDING}.{name}": getattr(config, name) for name in decide} | files,
        checkpoints=told.checkpoints,
        profile=told.profile,
        text=told.text or as_gin(told),
        export=functools.partial(_export, run),
        evaluate=evaluate,
        eval_every=config.eval_every,
    )  # fmt: skip


def _parts(run: _Run) -> Parts:
    """The step's parts for this encoder; the two optimisers differ in rate and length."""
    config, schedule = run.told.train, schedule_of(run.told.train)

    def optimizer(rate: float, steps: int) -> Any:
        own = dataclasses.replace(run.told.optimizer, learning_rate=rate, total_steps=steps)
        return make_optimizer(own)

    return Parts(
        logits=run.asked.logits,
        labels=lambda texts: texts.labels_b,
        fresh=run.start.small,
        teacher=optimizer(config.teacher_learning_rate, schedule.teacher),
        student=optimizer(config.student_learning_rate, schedule.round),
    )


def _shardings(run: _Run, parts: Parts) -> SelfTrainingState:
    """The sharding of each leaf of the state."""
    own = state_shardings(run.start.boxed, parts.student, run.patterns, run.mesh, run.rules)
    moving, frozen = trees.split(own.params, run.patterns)
    return SelfTrainingState(
        step=own.step, student=moving, teacher=moving, frozen=frozen, pretrained=moving,
        opt_state=own.opt_state, key=own.key, skipped=own.skipped, weightless=own.step,
    )  # fmt: skip


def _batches(run: _Run, schedule: Schedule) -> Any:
    """Rows of the three batches of each step, which follow from the step alone.

    Labelled rows are shuffled anew each epoch; unlabelled rows too, in each epoch of the labelled
    ones, as in the released code, so an epoch sees a part of them.
    """
    config = run.told.train
    few, many = len(run.labelled.labels_b), len(run.unlabelled.labels_b)
    streams = [
        grain.MapDataset.range(few).seed(seed).shuffle().repeat()
        for seed in (config.seed, (config.seed + 1) % (1 << 32))
    ]
    epoch = max(few // config.batch_size, 1)

    @functools.lru_cache(maxsize=2)
    def order(number: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[config.seed, number])).permutation(many)

    def from_stream(stream: Any, step: int, size: int) -> np.ndarray:
        return np.array([int(stream[step * size + place]) for place in range(size)])

    def rows_of(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = config.unlabelled_batch_size
        at = (step % epoch) * size + np.arange(size)
        return (
            from_stream(streams[0], step, config.batch_size),
            order(step // epoch)[at % many],
            from_stream(streams[1], step, config.meta_batch_size),
        )

    return iter(grain.MapDataset.range(schedule.total).map(rows_of).to_iter_dataset())


def _placed(run: _Run, rows: tuple[np.ndarray, ...]) -> tuple[Texts, ...]:
    sets = (run.labelled, run.unlabelled, run.labelled)
    return tuple(
        multihost.place_rows(
            texts.rows(index[multihost.local_rows(where, len(index))]), where, len(index)
        )
        for texts, index, where in zip(sets, rows, run.rows, strict=True)
    )


def _scored(run: _Run, logits_nc: np.ndarray, step: int) -> Scores:
    assert run.classifier is not None
    return score_file(run.directory, run.told.task, run.classifier, logits_nc, step)


def _export(run: _Run, state: SelfTrainingState) -> None:
    config = run.told.train
    params = multihost.to_host(state.params)
    about = {
        **about_task(run.told.task, "prompt", params, run.patterns),
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "weightless": int(state.weightless),
    }
    directory = run.directory / FINAL
    export_encoder(
        directory, run.start, params, run.patterns, config.encoder, config.encoder_base, about
    )
