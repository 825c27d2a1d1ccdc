"""The loop of a training run: steps over batches, metrics, checkpoints, and a run that goes on.

The retriever's training, encoders and classifiers run in it. `trainer.py` has a loop of its own,
since an index changes between its steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from atlas_jax.core import multihost
from atlas_jax.core.config import write_config
from atlas_jax.core.in_step import InStep
from atlas_jax.core.preemption import Preempted, Preemption
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.config import (
    CHECKPOINTS,
    CONFIG_FILE,
    CheckpointConfig,
    ProfileConfig,
)
from atlas_jax.training.metrics import RunLog, read_metrics
from atlas_jax.training.provenance import check_learnt, check_resumed
from atlas_jax.training.speed import TRACES, Speed, StepClock, Tracer

_EVAL = "eval"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What a run's loop needs.

    Attributes:
      directory: of the run; checkpoints, metrics and the final config are written into it.
      total_steps: the loop ends after this step.
      log_every: steps between two lines of metrics.
      step: (number, state, *batch) -> (state, metrics), mostly a `CompiledOnce`. The state has
        `step` and `skipped`, int32 scalars.
      batches: endless and resumable, with `get_state` and `set_state`, as Grain's iterators.
      place: what `batches` gives -> the further arguments of `step`, on the mesh.
      shapes: of the state, with shardings; a checkpoint is read into them.
      begin: makes the state of a run that has no checkpoint.
      opened: called with the state before the first step, of a run that goes on, too.
      settings: those that decide the order of the records, by binding.
      checkpoints, profile: when the run is saved, and what is measured.
      text: all settings as a gin file.
      speed: (state, *batch) -> what turns a step's time into rates; None = memory alone.
      export: writes what the run leaves, when all steps are made.
      evaluate: (state, step) -> scores, logged under `eval/`; None = none.
      eval_every: steps between evaluations; there is one at the end in any case.
      watch: called with the step and the values of each line of training metrics; raises a
        UserError where they show that the run has failed.
    """

    directory: Path
    total_steps: int
    log_every: int
    step: Callable[..., tuple[Any, Any]]
    batches: Any
    place: Callable[[Any], tuple[Any, ...]]
    shapes: Any
    begin: Callable[[], Any]
    settings: Mapping[str, Any]
    checkpoints: CheckpointConfig
    profile: ProfileConfig
    text: str
    opened: Callable[[Any], None] | None = None
    speed: Callable[..., Speed] | None = None
    export: Callable[[Any], None] | None = None
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None
    eval_every: int = 0
    watch: Callable[[int, Mapping[str, float]], None] | None = None


def run_loop(loop: Loop) -> Any:
    """Take all steps; continue from the run's last checkpoint if there is one.

    Returns:
      The state after the last step.

    Raises:
      UserError: a checkpoint of another model or with other settings, or every step was skipped.
      Preempted: the machine is about to be taken away; the last step is saved.
    """
    loop = dataclasses.replace(loop, batches=InStep(f"batches of {loop.directory}", loop.batches))
    with Checkpointer(loop.directory / CHECKPOINTS, loop.checkpoints) as checkpoints:
        found = checkpoints.restore(loop.shapes)
        if found is None:
            state = loop.begin()
        else:  # what the run began with is not read
            check_resumed(found.notes.get("settings"), loop.settings, str(loop.directory))
            state = found.state
            checkpoints.resume_data(loop.batches, found)
        if loop.opened is not None:
            loop.opened(state)
        writes = multihost.is_first()
        if writes:
            write_config(loop.directory / CONFIG_FILE, loop.text)
        with RunLog(loop.directory, int(state.step), loop.total_steps, writes) as log:
            tracer = Tracer(loop.profile, str(loop.directory / TRACES))
            with Preemption() as preemption, tracer:
                state = _steps(loop, state, checkpoints, log, preemption, tracer)
            check_learnt(int(state.step), int(state.skipped))
            if loop.export is not None:
                loop.export(state)  # before an evaluation, which may fail
            _evaluate(loop, state, loop.total_steps, log)
    return state


def _steps(
    loop: Loop,
    state: Any,
    checkpoints: Checkpointer,
    log: RunLog,
    preemption: Preemption,
    tracer: Tracer,
) -> Any:
    """Take the steps that are left."""
    clock, speed, first, every = StepClock(), None, int(state.step), loop.checkpoints.every
    due = 0 < first < loop.total_steps and _due(loop.eval_every, first)
    if due and not _is_evaluated(loop, first):  # the run was ended before it
        _evaluate(loop, state, first, log)
    for step in range(first + 1, loop.total_steps + 1):
        tracer.before(step)
        batch = loop.place(next(loop.batches))
        state, metrics = loop.step(step, state, *batch)
        clock.stepped(metrics)
        tracer.after(step, metrics)
        log.advance()
        last = step == loop.total_steps
        if step % loop.log_every == 0 or last:
            values = dict(jax.device_get(metrics))  # waits for the step
            if speed is None:
                speed = loop.speed(state, *batch) if loop.speed else Speed(0.0, {}, loop.profile)
            log.write(step, "train", values | speed.of(clock.lap()))
            if loop.watch is not None:
                loop.watch(step, values)
        stopping = preemption.reached(step) and not last
        if last or stopping or _due(every, step):
            notes = {"data": loop.batches.get_state(), "settings": dict(loop.settings)}
            with clock.paused(state):
                checkpoints.save(step, state, notes)
        if stopping:
            checkpoints.close()
            raise Preempted(f"stopped at step {step}, which is saved; start it again to go on")
        if _due(loop.eval_every, step) and not last:
            with clock.paused(state):
                _evaluate(loop, state, step, log)
    return state


def _evaluate(loop: Loop, state: Any, step: int, log: RunLog) -> None:
    if loop.evaluate is not None:
        log.write(step, _EVAL, loop.evaluate(state, step))


def _is_evaluated(loop: Loop, step: int) -> bool:
    rows = read_metrics(loop.directory) if multihost.is_first() else []
    done = any(row["step"] == step and any(k.startswith(_EVAL) for k in row) for row in rows)
    return bool(multihost.of_first(done))


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
