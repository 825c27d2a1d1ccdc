"""An encoder that self-training teaches: it is asked by the task's prompt."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from atlas_jax.core import multihost
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.types import Params
from atlas_jax.tasks.base import Record
from atlas_jax.training.classifier_scores import Classifier, score_file
from atlas_jax.training.encoder_start import about_task, export_encoder, for_task, open_start
from atlas_jax.training.encoder_state import trained_patterns
from atlas_jax.training.known import without_known
from atlas_jax.training.prompted import Asked, asked_by
from atlas_jax.training.self_training_config import SelfTrainingRun
from atlas_jax.training.taught import Scores, Taught

_HEAD = "mlm"


def taught_encoder(
    told: SelfTrainingRun, directory: Path, mesh: Mesh, rules: tuple[Rule, ...]
) -> Taught:
    """The encoder of a run with its files, which are read first: their faults are found at once.

    Raises:
      UserError: a setting or file at fault.
    """
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
    patterns = trained_patterns(start.shapes, config.train, (_HEAD,))

    def export(folder: Path, params: Params, counted: Mapping[str, Any]) -> None:
        params = multihost.to_host(params)
        about = about_task(task, "prompt", params, patterns) | dict(counted)
        base = config.encoder, config.encoder_base
        export_encoder(folder, start, params, patterns, *base, about)

    return Taught(
        boxed=start.boxed,
        patterns=patterns,
        start=lambda: start.params(config.seed),
        small=start.small,
        logits=asked.logits,
        labelled=asked.texts(labelled),
        unlabelled=asked.texts(unlabelled),
        export=export,
        scores=_scores(told, directory, evaluated, asked, mesh, rules) if evaluated else None,
    )


def _scores(
    told: SelfTrainingRun,
    directory: Path,
    records: Sequence[Record],
    asked: Asked,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Callable[[Params, int], Scores]:
    """What classifies and scores the evaluation file."""
    size = told.train.eval_batch_size
    rows = batch_sharding("SelfTrainConfig.eval_batch_size", size, mesh, rules)
    classifier = Classifier(records, asked.texts(records), size, rows, mesh)
    logits = classifier.logits(asked.logits)

    def scores(params: Params, step: int) -> Scores:
        return score_file(directory, told.task, classifier, logits(params), step)

    return scores
