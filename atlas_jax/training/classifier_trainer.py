"""Few-shot classification by an encoder: a prompt, a classifier, a probe, or the majority."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import multihost, partitioning, trees
from atlas_jax.core.config import write_config
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.types import Params
from atlas_jax.tasks.base import Record
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.classifier_config import ClassifierRun
from atlas_jax.training.classifier_scores import (
    Classifier,
    fit_probe,
    majority_logits,
    probe_logits,
    score_file,
)
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.config import CONFIG_FILE, FINAL
from atlas_jax.training.demonstrations import Demonstrated, demonstrated
from atlas_jax.training.encoder_start import Start, about_task, export_encoder, for_task, open_start
from atlas_jax.training.encoder_state import (
    EncoderState,
    LossFn,
    abstract,
    begun,
    fresh_state,
    make_step,
    state_shardings,
    trained_patterns,
)
from atlas_jax.training.loop import Loop, run_loop
from atlas_jax.training.metrics import RunLog
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.prompted import (
    Asked,
    SoftTexts,
    Texts,
    asked_by,
    classify_loss,
    distil_loss,
    mean_states,
)
from atlas_jax.training.provenance import file_mark
from atlas_jax.training.speed import Speed, encoder_flops

_BINDING = "ClassifierTrainConfig"
HEADS = {"prompt": "mlm", "head": "sentence"}  # method -> the head that it uses
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Run:
    """The objects that stay the same during a run.

    Attributes:
      head: name of the head in use; "" for a probe and the majority.
      records, texts: of the training file.
      loss: of a step, on rows of `texts`.
      classifier: of the evaluation file; None without one.
    """

    told: ClassifierRun
    directory: Path
    mesh: Mesh
    rules: tuple[Rule, ...]
    start: Start
    head: str
    asked: Asked
    records: Sequence[Record]
    texts: Texts | SoftTexts | Demonstrated
    loss: LossFn
    classifier: Classifier | None


def train_classifier(told: ClassifierRun, records: Sequence[Record] | None = None) -> Scores:
    """Train an encoder on a classification task, and score it; a killed run goes on.

    `model_dir/final` is written where there were steps: what trained, on top of the encoder that
    the run began with, or a whole encoder where all of it trained.

    Args:
      told: the run.
      records: labelled lines in place of those of its file, whose bytes are still compared when a
        killed run goes on.

    Returns:
      The scores of the evaluation file, empty without one.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    directory = check_output_folder(told.train.model_dir, f"{_BINDING}.model_dir")
    with use_devices(told.devices) as (mesh, rules):
        run = _prepare(told, directory, mesh, rules, records)
        return _trained(run) if told.train.steps else _untrained(run)


def distil_classifier(
    told: ClassifierRun, records: Sequence[Record], logits_nc: np.ndarray, temperature: float
) -> Scores:
    """As `train_classifier`, from what other models say of texts in place of their labels.

    Args:
      told: the run; its file is not read, but its bytes are compared when a killed run goes on.
      records: of the texts.
      logits_nc: the others' class logits [n, c].
      temperature: by which both sides' logits are divided; the loss is multiplied by its square.
    """
    directory = check_output_folder(told.train.model_dir, f"{_BINDING}.model_dir")
    with use_devices(told.devices) as (mesh, rules):
        run = _prepare(told, directory, mesh, rules, records)
        assert isinstance(run.texts, Texts)
        soft = SoftTexts(run.texts, np.asarray(logits_nc, np.float32))
        loss = distil_loss(run.asked.logits, temperature)
        return _trained(dataclasses.replace(run, texts=soft, loss=loss))


def _prepare(
    told: ClassifierRun,
    directory: Path,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    records: Sequence[Record] | None = None,
) -> _Run:
    """Everything that a run needs but its state. Files first: their faults are found at once."""
    config, task = told.train, told.task
    if records is None:
        records = task.load(config.file, rows=told.rows)
    evaluated = []
    if config.eval_file:
        evaluated = task.load(config.eval_file, need_targets=False, rows=told.rows)
    head = HEADS.get(config.method, "")
    start = open_start(
        config.encoder, config.encoder_base, told.encoder, for_task(told.delta, task), head,
        len(task.labels), task.name, config.seed, config.steps > 0,
    )  # fmt: skip
    encoder = start.encoder
    prompted = config.method == "prompt"
    asked = asked_by(task, encoder.model, encoder.tokenizer, prompted, config.length, start.soft)
    make: Callable[[Sequence[Record]], Texts | Demonstrated] = asked.texts

    def reading(records: Sequence[Record], texts: Texts | Demonstrated) -> Classifier:
        size = config.eval_batch_size
        rows = batch_sharding(f"{_BINDING}.eval_batch_size", size, mesh, rules)
        return Classifier(records, texts, size, rows, mesh, told.demonstrations.draws)

    if told.demonstrations.kind != "none":
        make = _demonstrating(told, start, records, reading)
    texts = make(records)
    classifier = reading(evaluated, make(evaluated)) if evaluated else None
    loss = classify_loss(asked.logits)
    return _Run(told, directory, mesh, rules, start, head, asked, records, texts, loss, classifier)


def _demonstrating(
    told: ClassifierRun,
    start: Start,
    support: Sequence[Record],
    reading: Callable[..., Classifier],
) -> Callable[[Sequence[Record]], Demonstrated]:
    """What makes texts with examples from the labelled lines of records.

    Args:
      reading: records and texts -> what reads them a batch at a time.

    Raises:
      UserError: another method than 'prompt', or an encoder with a trained prompt.
    """
    config, task, encoder = told.train, told.task, start.encoder
    if config.method != "prompt" or start.soft:
        raise UserError(
            f"DemonstrationConfig.kind = {told.demonstrations.kind!r}: examples stand behind the "
            f"task's template, so they need {_BINDING}.method = 'prompt' (it is "
            f"{config.method!r}) and an encoder without a trained prompt"
        )
    plain = asked_by(task, encoder.model, encoder.tokenizer, False, config.length)

    def features(records: Sequence[Record]) -> np.ndarray:
        read = reading(records, plain.texts(records))
        params = multihost.place(start.params(config.seed), partitioning.replicated(read.mesh))
        return read.each(functools.partial(mean_states, encoder.model))(params)

    def make(records: Sequence[Record]) -> Demonstrated:
        return demonstrated(
            task, records, support, encoder.tokenizer, config.length, told.demonstrations,
            config.seed, features,
        )  # fmt: skip

    return make


def _trained(run: _Run) -> Scores:
    """Take the steps, write what was learnt, score it."""
    told, config, start = run.told, run.told.train, run.start
    patterns = trained_patterns(start.shapes, config.train, (run.head,))
    optimizer = make_optimizer(told.optimizer)

    def fresh(params: Params) -> EncoderState:
        return fresh_state(params, optimizer, patterns, config.seed, f"{_BINDING}.train")

    shardings = state_shardings(start.boxed, optimizer, patterns, run.mesh, run.rules)
    rows = batch_sharding(f"{_BINDING}.batch_size", config.batch_size, run.mesh, run.rules)
    step = make_step(run.loss, optimizer, patterns)
    everywhere = partitioning.replicated(run.mesh)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
    scores: Scores = {}

    def evaluate(state: EncoderState, at: int) -> Scores:
        scores.update(_scored(run, logits(state.params), at))
        return scores

    logits: Any = run.classifier.logits(run.asked.logits) if run.classifier else None
    run_loop(
        Loop(
            directory=run.directory,
            total_steps=config.steps,
            log_every=config.log_every,
            step=CompiledOnce(compiled, "state", "texts", smaller=f"{_BINDING}.batch_size"),
            batches=_batches(run.texts, config.batch_size, config.seed),
            place=functools.partial(_placed, run.texts, rows),
            shapes=abstract(fresh, shardings, start.shapes),
            begin=lambda: begun(fresh, start.params(config.seed), shardings),
            settings={
                f"{_BINDING}.batch_size": config.batch_size,
                f"{_BINDING}.seed": config.seed,
                f"{_BINDING}.file": file_mark(config.file),
            },
            checkpoints=told.checkpoints,
            profile=told.profile,
            text=told.text or as_gin(told),
            speed=functools.partial(_speed, run, patterns),
            export=functools.partial(_export, run, patterns),
            evaluate=evaluate if run.classifier else None,
            eval_every=config.eval_every,
        )
    )
    return scores


def _untrained(run: _Run) -> Scores:
    """Score an encoder as it is, a probe on it, or the majority."""
    config, classifier = run.told.train, run.classifier
    assert classifier is not None, "ClassifierTrainConfig wants a file where nothing is trained"
    if multihost.is_first():
        write_config(run.directory / CONFIG_FILE, run.told.text or as_gin(run.told))
    labels_n = np.asarray(run.texts.labels_b)
    if config.method == "majority":
        logits_nc = majority_logits(run.told.task, labels_n, len(classifier.records))
    else:
        everywhere = partitioning.replicated(run.mesh)
        params = multihost.place(run.start.params(config.seed), everywhere)
        if config.method == "probe":
            logits_nc = _probed(run, classifier, params, labels_n)
        else:
            logits_nc = classifier.logits(run.asked.logits)(params)
    with RunLog(run.directory, 0, 0, multihost.is_first()) as log:
        scores = _scored(run, logits_nc, 0)
        log.write(0, "eval", scores)
    return scores


def _probed(run: _Run, classifier: Classifier, params: Any, labels_n: np.ndarray) -> np.ndarray:
    """Class logits of the evaluation file by a probe that is fitted to the training file."""
    features = functools.partial(mean_states, run.start.encoder.model)
    assert isinstance(run.texts, Texts)
    taught = dataclasses.replace(classifier, records=[None] * len(labels_n), texts=run.texts)  # type: ignore[list-item]
    weights = fit_probe(
        taught.each(features)(params), labels_n, len(run.told.task.labels),
        run.told.train.probe_decay,
    )  # fmt: skip
    return probe_logits(weights, classifier.each(features)(params))


def _scored(run: _Run, logits_nc: np.ndarray, step: int) -> Scores:
    assert run.classifier is not None
    return score_file(run.directory, run.told.task, run.classifier, logits_nc, step)


def _batches(texts: Texts | SoftTexts | Demonstrated, batch_size: int, seed: int) -> Any:
    """Endless rows of the texts, shuffled anew each epoch; the iterator has a state.

    With demonstrations, a row is its number and that of a draw, another one each time.
    """
    rows = grain.MapDataset.range(len(texts.labels_b)).seed(seed).shuffle().repeat()
    if isinstance(texts, Demonstrated):
        rows = rows.random_map(lambda row, rng: np.array([row, rng.integers(1 << 31)]))
    return iter(rows.batch(batch_size, drop_remainder=True, batch_fn=np.stack).to_iter_dataset())


def _placed(
    texts: Texts | SoftTexts | Demonstrated, rows: NamedSharding, index: np.ndarray
) -> tuple[Any]:
    mine = multihost.local_rows(rows, len(index))
    return (multihost.place_rows(texts.rows(index[mine]), rows, len(index)),)


def _speed(run: _Run, patterns: tuple[str, ...], state: EncoderState, texts: Any) -> Speed:
    moving, _ = trees.split(state.params, patterns)
    tokens = int(texts.tokens_bl.size)
    uses: Callable[[str], int] = run.start.encoder.config.tower.uses
    flops = encoder_flops(state.params, moving, tokens, uses)
    counts = {"tokens": tokens, "texts": len(texts.labels_b)}
    return Speed(flops, counts, run.told.profile)


def _export(run: _Run, patterns: tuple[str, ...], state: EncoderState) -> None:
    told, config = run.told, run.told.train
    params = multihost.to_host(state.params)
    about = {
        **about_task(told.task, config.method, params, patterns),
        "steps": int(state.step),
        "skipped": int(state.skipped),
    }
    directory = run.directory / FINAL
    export_encoder(
        directory, run.start, params, patterns, config.encoder, config.encoder_base, about
    )
