"""PET and iPET (arXiv 2001.07676): prompted models label texts, from which a classifier learns.

Sources: pet (modeling.py, wrapper.py, cli.py).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.config import write_config
from atlas_jax.core.devices import use_devices
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.tasks.base import Record
from atlas_jax.tasks.classification import ClassificationTask
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.classifier_config import ClassifierRun, ClassifierTrainConfig
from atlas_jax.training.classifier_scores import Classifier, scores_of, write_predictions
from atlas_jax.training.classifier_trainer import distil_classifier, train_classifier
from atlas_jax.training.config import CONFIG_FILE, FINAL
from atlas_jax.training.encoder_start import open_start
from atlas_jax.training.ipet import new_lines, weighted_mean
from atlas_jax.training.known import without_known
from atlas_jax.training.pet_config import PetConfig, PetRun
from atlas_jax.training.prompted import asked_by

_BINDING = "PetConfig"
MEMBERS, MEMBERS_FILE, LABELLED = "members", "members.jsonl", "unlabelled_predictions.jsonl"
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the models that label the texts.

    Attributes:
      name: of its folder below `members/`.
      task: with the pattern as its template.
      seed: of its run.
      weight: what it counts.
      before: accuracy of its pattern on the labelled lines before training.
    """

    name: str
    task: ClassificationTask
    seed: int
    weight: float = 1.0
    before: float = 0.0


def pet(told: PetRun) -> Scores:
    """Train the members, label the unlabelled lines by them, distil a classifier.

    `model_dir/final` is the classifier, `model_dir/members.jsonl` says what each member counts,
    `model_dir/unlabelled_predictions.jsonl` what all of them say together. A run that was killed
    goes on; members that are done are read again.

    Returns:
      The classifier's scores on the evaluation file, empty without one.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    config = told.train
    directory = check_output_folder(config.model_dir, f"{_BINDING}.model_dir")
    labelled, unlabelled = _records(told)
    if multihost.is_first():
        write_config(directory / CONFIG_FILE, told.text or as_gin(told))
    members = _weighted(told, labelled)
    weights = [member.weight for member in members]
    sets: list[list[Record]] = [[] for _ in members]
    logits: list[np.ndarray] = []
    lines: list[dict[str, Any]] = []
    for generation in range(config.generations):
        if generation:
            sets = new_lines(config, told.task, (labelled, unlabelled), logits, weights, generation)
        logits = []
        for member, new in zip(members, sets, strict=True):
            scores, said_nc = _member(told, member, [*labelled, *new], unlabelled, generation)
            logits.append(said_nc)
            lines.append(_line(member, generation, len(labelled) + len(new), scores))
    logits_nc = weighted_mean(logits, weights)
    if multihost.is_first():
        write_jsonl(directory / MEMBERS_FILE, lines)
        write_predictions(directory / LABELLED, told.task, unlabelled, logits_nc)
    return distil_classifier(_student_run(told), unlabelled, logits_nc, config.temperature)


def members_of(told: PetRun) -> Iterator[Member]:
    """A member for each pattern and seed."""
    config = told.train
    for number, pattern in enumerate(config.patterns or (told.task.query_format,)):
        task = dataclasses.replace(told.task, query_format=pattern)
        for j in range(config.seeds):
            yield Member(f"pattern{number}_seed{j}", task, config.seed + j)


def _weighted(told: PetRun, labelled: Sequence[Record]) -> list[Member]:
    """The members, with what each counts."""
    found: dict[str, float] = {}
    members = list(members_of(told))
    with use_devices(told.devices) as (mesh, rules):
        for member in members:
            pattern = member.task.query_format
            if pattern not in found:
                found[pattern] = _accuracy(told, member.task, labelled, mesh, rules)
    before = [found[member.task.query_format] for member in members]
    weights = before if told.train.weighted else [1.0] * len(before)
    return [
        dataclasses.replace(member, weight=weight, before=accuracy)
        for member, weight, accuracy in zip(members, weights, before, strict=True)
    ]


def _member(
    told: PetRun, member: Member, lines: Sequence[Record], unlabelled: Sequence[Record],
    generation: int,
) -> tuple[Scores, np.ndarray]:  # fmt: skip
    """A member trained on these lines: its scores, and its logits [n, c] of the unlabelled ones."""
    run = _member_run(told, member, generation)
    scores = train_classifier(run, lines)
    folder = str(Path(run.train.model_dir) / FINAL)
    with use_devices(told.devices) as (mesh, rules):
        return scores, _logits(told, folder, "", member.task, unlabelled, mesh, rules)


def _line(member: Member, generation: int, count: int, scores: Scores) -> dict[str, Any]:
    """What members.jsonl says of a member."""
    return {
        "member": member.name, "generation": generation, "pattern": member.task.query_format,
        "seed": member.seed, "lines": count, "weight": member.weight,
        "accuracy_before": member.before, **scores,
    }  # fmt: skip


def _records(told: PetRun) -> tuple[list[Record], list[Record]]:
    """Labelled and unlabelled lines, those left out that are to be."""
    config, task = told.train, told.task
    labelled = task.load(config.file, rows=told.rows)
    unlabelled = task.load(config.unlabelled_file, need_targets=False, rows=told.rows)
    if config.leave_out_known:
        known = list(labelled)
        if config.eval_file:
            known += task.load(config.eval_file, need_targets=False, rows=told.rows)
        unlabelled = without_known(unlabelled, known, task.asks, config)
    if 0 < config.unlabelled_rows < len(unlabelled):
        drawn = np.random.Generator(np.random.Philox(config.seed)).permutation(len(unlabelled))
        unlabelled = [unlabelled[row] for row in sorted(drawn[: config.unlabelled_rows])]
    return labelled, unlabelled


def _member_run(told: PetRun, member: Member, generation: int) -> ClassifierRun:
    config = told.train
    name = f"{member.name}_generation{generation}" if generation else member.name
    train = ClassifierTrainConfig(
        model_dir=str(Path(config.model_dir) / MEMBERS / name), file=config.file, method="prompt",
        total_steps=config.steps, batch_size=config.batch_size, train=config.train,
        seed=member.seed, **_common(config),
    )  # fmt: skip
    return _run(told, member.task, train)


def _student_run(told: PetRun) -> ClassifierRun:
    config = told.train
    train = ClassifierTrainConfig(
        model_dir=config.model_dir, file=config.unlabelled_file, method="head",
        total_steps=config.distil_steps, batch_size=config.distil_batch_size, seed=config.seed,
        **_common(config),
    )  # fmt: skip
    return dataclasses.replace(_run(told, told.task, train), text=told.text or as_gin(told))


def _common(config: PetConfig) -> dict[str, Any]:
    names = ("encoder", "encoder_base", "task", "eval_file", "length", "log_every",
             "eval_batch_size")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _run(told: PetRun, task: ClassificationTask, train: ClassifierTrainConfig) -> ClassifierRun:
    optimizer = dataclasses.replace(
        told.optimizer, learning_rate=told.train.learning_rate, total_steps=train.total_steps
    )
    return ClassifierRun(
        task=task, train=train, optimizer=optimizer, encoder=told.encoder, delta=told.delta,
        devices=told.devices, checkpoints=told.checkpoints, profile=told.profile, rows=told.rows,
    )  # fmt: skip


def _accuracy(
    told: PetRun, task: ClassificationTask, labelled: Sequence[Record], mesh: Mesh,
    rules: tuple[Rule, ...],
) -> float:  # fmt: skip
    """Of the untrained encoder under a pattern, on the labelled lines."""
    config = told.train
    logits_nc = _logits(told, config.encoder, config.encoder_base, task, labelled, mesh, rules)
    places = {label: number for number, label in enumerate(task.labels)}
    labels_n = np.array([places[record.fields[task.label]] for record in labelled])
    return scores_of(task, labels_n, logits_nc.argmax(axis=1))["accuracy"]


def _logits(
    told: PetRun, folder: str, base: str, task: ClassificationTask, records: Sequence[Record],
    mesh: Mesh, rules: tuple[Rule, ...],
) -> np.ndarray:  # fmt: skip
    """Class logits [n, c] of a folder's encoder as it is, by the task's prompt."""
    config = told.train
    start = open_start(
        folder, base, told.encoder, PetRun.delta, "mlm", len(task.labels), task.name, 0, False
    )
    model, tokenizer = start.encoder.model, start.encoder.tokenizer
    asked = asked_by(task, model, tokenizer, True, config.length, start.soft)
    size = config.eval_batch_size
    rows = batch_sharding(f"{_BINDING}.eval_batch_size", size, mesh, rules)
    classifier = Classifier(records, asked.texts(records), size, rows, mesh)
    params = multihost.place(start.params(0), partitioning.replicated(mesh))
    return classifier.logits(asked.logits)(params)
