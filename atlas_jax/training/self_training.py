"""LiST's self-training (arXiv 2110.06274): few labelled lines, many without labels.

The loop is one for all models. What it teaches is a `Taught`: an encoder that is asked by a prompt,
or the reader over the passages that are found for a line.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import multihost, partitioning, trees
from atlas_jax.core.devices import use_devices
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.types import Params
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.config import FINAL
from atlas_jax.training.encoder_state import abstract, begun, state_shardings
from atlas_jax.training.loop import Loop, run_loop
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.provenance import file_mark
from atlas_jax.training.self_training_config import (
    ReaderSelfTrainingRun,
    SelfTrainConfig,
    SelfTrainingRun,
)
from atlas_jax.training.self_training_step import (
    Parts,
    Schedule,
    SelfTrainingState,
    fresh_state,
    make_self_training_step,
)
from atlas_jax.training.taught import Scores, Taught
from atlas_jax.training.taught_encoder import taught_encoder
from atlas_jax.training.taught_reader import taught_reader

_BINDING = "SelfTrainConfig"
_SIZES = ("batch_size", "unlabelled_batch_size", "meta_batch_size")
AnyRun = SelfTrainingRun | ReaderSelfTrainingRun


@dataclasses.dataclass(frozen=True)
class _Run:
    """The objects that stay the same during a run; `rows` are the three batches' shardings."""

    told: AnyRun
    directory: Path
    taught: Taught
    mesh: Mesh
    rules: tuple[Rule, ...]
    rows: tuple[NamedSharding, ...]


def self_train(told: AnyRun) -> Scores:
    """Train a teacher, then rounds of students; a run that was killed goes on inside a round.

    `model_dir/final` holds the last student, on top of the model that the run began with.

    Returns:
      The last student's scores on the evaluation file, empty without one.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    config = told.train
    directory = check_output_folder(config.model_dir, f"{_BINDING}.model_dir")
    with use_devices(told.devices) as (mesh, rules):
        rows = tuple(
            batch_sharding(f"{_BINDING}.{name}", getattr(config, name), mesh, rules)
            for name in _SIZES
        )
        taught = _taught(told, directory, mesh, rules)
        last: Scores = {}

        def evaluate(state: SelfTrainingState, step: int) -> Scores:
            assert taught.scores is not None
            last.update(taught.scores(state.params, step))
            return last

        run = _Run(told, directory, taught, mesh, rules, rows)
        run_loop(_loop(run, evaluate if taught.scores else None))
    return last


def _taught(told: AnyRun, directory: Path, mesh: Mesh, rules: tuple[Rule, ...]) -> Taught:
    if isinstance(told, ReaderSelfTrainingRun):
        return taught_reader(told, directory, mesh, rules)
    return taught_encoder(told, directory, mesh, rules)


def schedule_of(config: SelfTrainConfig) -> Schedule:
    """The phases of a run."""
    return Schedule(
        config.teacher_steps, config.rounds, config.kd_steps, config.meta_steps, config.tune_steps
    )


def _loop(run: _Run, evaluate: Callable[[SelfTrainingState, int], Scores] | None) -> Loop:
    told, config, taught = run.told, run.told.train, run.taught
    schedule, parts = schedule_of(config), _parts(run)
    shardings = _shardings(run, parts)
    step = make_self_training_step(
        parts, schedule, config.meta_learning_rate, config.weighted,
        config.pseudo_labels == "hard",
    )  # fmt: skip
    everywhere = partitioning.replicated(run.mesh)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))

    def fresh(params: Params) -> SelfTrainingState:
        moving, frozen = trees.split(params, taught.patterns, f"{_BINDING}.train")
        return fresh_state(moving, frozen, parts, config.seed)

    decide = ("seed", *_SIZES, "teacher_steps", "kd_steps", "meta_steps", "tune_steps")
    files = {f"{_BINDING}.{name}": file_mark(getattr(config, name))
             for name in ("file", "unlabelled_file")}  # fmt: skip
    return Loop(
        directory=run.directory,
        total_steps=schedule.total,
        log_every=config.log_every,
        step=_finding(run, CompiledOnce(
            compiled, "state", "labelled", "unlabelled", "meta",
            smaller=f"{_BINDING}.unlabelled_batch_size",
        )),
        batches=_batches(run, schedule),
        place=functools.partial(_placed, run),
        shapes=abstract(fresh, shardings, meta.unbox(taught.boxed)),
        begin=lambda: begun(fresh, taught.start(), shardings),
        opened=lambda state: taught.opened(state.params),
        settings={f"{_BINDING}.{name}": getattr(config, name) for name in decide} | files,
        checkpoints=told.checkpoints,
        profile=told.profile,
        text=told.text or as_gin(told),
        export=functools.partial(_export, run),
        evaluate=evaluate,
        eval_every=config.eval_every,
    )  # fmt: skip


def _finding(run: _Run, step: CompiledOnce) -> Callable[..., Any]:
    """The step, behind what is looked up for its rows by parameters that never train."""

    def call(number: int, state: SelfTrainingState, *batches: Any) -> Any:
        frozen = state.frozen
        return step(number, state, *(run.taught.found(frozen, rows) for rows in batches))

    return call


def _parts(run: _Run) -> Parts:
    """The step's parts for this model; the two optimisers differ in rate and length."""
    config, schedule = run.told.train, schedule_of(run.told.train)

    def optimizer(rate: float, steps: int) -> Any:
        own = dataclasses.replace(run.told.optimizer, learning_rate=rate, total_steps=steps)
        return make_optimizer(own)

    return Parts(
        logits=run.taught.logits,
        labels=lambda rows: rows.labels_b,
        fresh=run.taught.small,
        teacher=optimizer(config.teacher_learning_rate, schedule.teacher),
        student=optimizer(config.student_learning_rate, schedule.round),
    )


def _shardings(run: _Run, parts: Parts) -> SelfTrainingState:
    """The sharding of each leaf of the state."""
    taught = run.taught
    own = state_shardings(taught.boxed, parts.student, taught.patterns, run.mesh, run.rules)
    moving, frozen = trees.split(own.params, taught.patterns)
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
    few, many = len(run.taught.labelled.labels_b), len(run.taught.unlabelled.labels_b)
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


def _placed(run: _Run, rows: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    taught = run.taught
    sets = (taught.labelled, taught.unlabelled, taught.labelled)
    return tuple(
        multihost.place_rows(
            lines.rows(index[multihost.local_rows(where, len(index))]), where, len(index)
        )
        for lines, index, where in zip(sets, rows, run.rows, strict=True)
    )


def _export(run: _Run, state: SelfTrainingState) -> None:
    counted = {name: int(getattr(state, name)) for name in ("skipped", "weightless")}
    counted = {"steps": int(state.step), **counted}
    run.taught.export(run.directory / FINAL, state.params, counted)
